#include "train/demo_answers.h"

#include <fstream>
#include <nlohmann/json.hpp>

#include "models/generate.h"

namespace graft {

void write_jsonl(const std::filesystem::path& path,
                 const std::vector<nlohmann::ordered_json>& rows) {
  std::ofstream file(path, std::ios::binary);
  for (const auto& row : rows) file << row.dump() << "\n";
  file.close();
  CHECK(file.good(), "demo: cannot write ", path.string());
}

void write_items(const std::filesystem::path& path, const std::vector<DemoItem>& items) {
  std::vector<nlohmann::ordered_json> rows;
  for (const DemoItem& item : items)
    rows.push_back({{"prompt", item.prompt}, {"completion", item.completion}});
  write_jsonl(path, rows);
}

std::vector<std::string> answers(Decoder& model, const Tokenizer& tokenizer,
                                 const std::vector<DemoItem>& items) {
  GenerationConfig greedy;
  greedy.do_sample = false;
  greedy.temperature = 0;
  greedy.max_new_tokens = 64;
  greedy.eos_token_ids = {tokenizer.eos_id().value()};
  std::vector<std::string> texts;
  for (const DemoItem& item : items)
    texts.push_back(tokenizer.decode(generate(model, tokenizer.encode(item.prompt).ids, greedy)));
  return texts;
}

double exact_match(const std::vector<std::string>& texts, const std::vector<DemoItem>& items) {
  int exact = 0;
  for (size_t i = 0; i < items.size(); ++i) exact += texts[i] == items[i].completion;
  return double(exact) / double(items.size());
}

}  // namespace graft
