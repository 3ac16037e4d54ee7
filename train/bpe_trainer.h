// Learns a byte-level BPE vocabulary from text and writes it as Hugging Face files. It exists for
// the bundled model alone (train/demo_data.h), so it is the short version: every merge recounts all
// pairs of the distinct words. Which merge comes next is decided as in the `tokenizers` library:
// the most frequent pair, and among equals the one with the smaller ids.
#pragma once

#include <string>
#include <utility>
#include <vector>

namespace graft {

// Tokens are in the printable alphabet of byte-level BPE: byte 0x20 is "Ġ".
struct BpeVocabulary {
  std::vector<std::string> tokens;  // by id: the special ones, the 256 bytes, one per merge
  std::vector<std::pair<std::string, std::string>> merges;
  int num_special = 0;
};

// Words are cut by the pattern of GPT-2. Fewer than vocab_size tokens come back when every word of
// the texts has become one token.
BpeVocabulary train_bpe(const std::vector<std::string>& texts, int vocab_size,
                        const std::vector<std::string>& special_tokens);

// Writes tokenizer.json and tokenizer_config.json; special token 0 is the eos.
void save_tokenizer(const std::string& directory, const BpeVocabulary& vocabulary);

}  // namespace graft
