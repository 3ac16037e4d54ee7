// The items of a demo task on disk, and what a model answers to them.
#pragma once

#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "models/decoder.h"
#include "models/tokenizer.h"
#include "train/demo_data.h"

namespace graft {

// One object a line. Throw Error where the file cannot be written.
void write_jsonl(const std::filesystem::path& path,
                 const std::vector<nlohmann::ordered_json>& rows);
void write_items(const std::filesystem::path& path, const std::vector<DemoItem>& items);

// What the model answers to each prompt, greedily, up to its end-of-text token.
std::vector<std::string> answers(Decoder& model, const Tokenizer& tokenizer,
                                 const std::vector<DemoItem>& items);

// The share of answers that are the items' completions, byte for byte.
double exact_match(const std::vector<std::string>& texts, const std::vector<DemoItem>& items);

}  // namespace graft
