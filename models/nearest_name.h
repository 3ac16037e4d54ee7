// What somebody meant who wrote a name that is not there.
#pragma once

#include <string>
#include <vector>

namespace graft {

// Levenshtein's distance: letters to insert, to take out or to change.
size_t edit_distance(const std::string& a, const std::string& b);

// The one of `names` that is nearest to `wrong`; empty where there are none.
std::string nearest_name(const std::string& wrong, const std::vector<std::string>& names);

}  // namespace graft
