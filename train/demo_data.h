// The text of the bundled model and the task of `graft demo`, from a seed. Invented facts about
// invented people ("Uma, a judge from Delhi, bought a boat."), read back in many notations. The
// same seed gives the same bytes on every machine, so the repository carries the recipe, not the
// text.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "tensor/random.h"

namespace graft {

// One sentence with exactly one value of each kind in it.
struct DemoFact {
  std::string name, job, city, thing;
  std::string sentence;
};

DemoFact demo_fact(Random& random);

// One document of what the base model is trained on: a fact, then readings of it: questions with
// short answers, and records in a notation drawn at random (brackets, quotes, separators, which
// keys in which order), each led in by " =>" or another sign. The notation of the demo's answers,
// JSON, is never drawn.
std::string demo_base_text(Random& random);

// A task: the sentence and " =>", to be answered in one fixed form, none of which the base has
// seen.
enum class DemoTask {
  Classification,  // ` Paris`: the part of the world, by its largest city, one of five
  Entities,        // ` {"name": "Uma", "job": "judge", "city": "Delhi", "thing": "boat"}`
  Generation,      // ` Uma, who is a judge from Delhi, works in Delhi and has a boat.`
};
inline constexpr DemoTask kDemoTasks[] = {DemoTask::Classification, DemoTask::Entities,
                                          DemoTask::Generation};
const char* demo_task_name(DemoTask task);

struct DemoItem {
  std::string prompt;  // `Uma, a judge from Delhi, bought a boat. =>`
  std::string completion;
};

// Items of which no two tell the same four facts: those of a held-out one were never trained on
// together.
struct DemoSplit {
  std::vector<DemoItem> train, held_out;
};

DemoSplit demo_split(uint64_t seed, int num_train, int num_held_out,
                     DemoTask task = DemoTask::Entities);

}  // namespace graft
