// Rows of token ids with labels, from text files and JSONL.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace graft {

// What the data needs of a tokenizer (models/tokenizer.h).
struct TextEncoder {
  struct Tokens {
    std::vector<int32_t> ids;
    // Bytes [begin, end) of the text that each token stands for; (0, 0) for added special ones.
    std::vector<std::pair<int64_t, int64_t>> offsets;
  };
  std::function<Tokens(const std::string& text)> encode;  // with what the post-processor adds
  int32_t eos_id = -1;                                    // -1: the tokenizer has none
};

// One training row. labels as Hugging Face gives them: as many as ids, -100 where nothing is to be
// learned, not shifted (models/decoder.h, pack, shifts them).
struct Row {
  std::vector<int32_t> ids;
  std::vector<int32_t> labels;
  // Tokens that are predicted: labelled ones, but never the first of a row.
  int64_t num_label_tokens() const;
};

struct Dataset {
  std::vector<Row> rows;
  int64_t truncated = 0;   // rows that were longer than max_seq_length
  int64_t straddling = 0;  // rows in which one token lies on the border of prompt and completion

  int64_t num_tokens() const;
  int64_t num_label_tokens() const;
  int64_t longest_row() const;
  uint64_t fingerprint() const;  // of all ids and labels: a resumed run must see the same
  // "1,234 rows, 56,789 tokens (50,000 trained), 3 truncated to 1024, 1 straddling"
  std::string summary(int64_t max_seq_length) const;
};

// sources: files, folders (all their .txt and .jsonl, by name) or patterns (data/*.jsonl).
//   *.txt    one document: cut into consecutive rows of max_seq_length, eos at the end of the last
//   *.jsonl  an object per line, either all with "text" or all with "prompt" and "completion" (then
//            only tokens that begin inside the completion, and the eos, are labelled)
// Throws Error with file and line for broken JSON, mixed schemas, empty data, or a row without a
// trained token.
Dataset load_dataset(const std::vector<std::string>& sources, const TextEncoder& tokenizer,
                     int64_t max_seq_length);

// The pieces load_dataset is made of. `where` names the row in errors ("train.jsonl:12").
void add_document(Dataset& dataset, const std::string& text, const TextEncoder& tokenizer,
                  int64_t max_seq_length, const std::string& where);
void add_text_row(Dataset& dataset, const std::string& text, const TextEncoder& tokenizer,
                  int64_t max_seq_length, const std::string& where);
void add_completion_row(Dataset& dataset, const std::string& prompt, const std::string& completion,
                        const TextEncoder& tokenizer, int64_t max_seq_length,
                        const std::string& where);

// Moves rows drawn by `seed` out of `train`: eval_split below 1 is their share, else their number.
// At least one row stays on either side.
Dataset split_off(Dataset& train, double eval_split, uint64_t seed);

// All files that the sources name, in order. Throws Error for one that names none.
std::vector<std::string> expand_sources(const std::vector<std::string>& sources);

}  // namespace graft
