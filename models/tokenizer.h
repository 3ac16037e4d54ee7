// Text to token ids and back, as tokenizer.json says: normalise, split, merge byte pairs, and what
// surrounds them. Meaning and offsets are those of the Hugging Face tokenizers library.
// The parts are declared in models/tokenizer_parts.h, one source file each.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace graft {

// For every id the byte range [begin, end) of the original text it came from. A token that the
// post-processor adds has the empty range at the place where it was inserted: (0, 0) before the
// text, (size, size) after it. A character that takes several tokens gives each of them its whole
// range.
struct Encoding {
  std::vector<int32_t> ids;
  std::vector<std::pair<int64_t, int64_t>> offsets;
};

struct TokenizerParts;  // models/tokenizer_parts.h

// Immutable after load, safe to use from several threads, cheap to copy (copies share everything).
class Tokenizer {
 public:
  // Reads tokenizer.json (required) and tokenizer_config.json (optional: bos_token, eos_token,
  // each a string or an AddedToken object). Throws Error, naming the file, if it is broken or asks
  // for a component that is not supported.
  static Tokenizer load(const std::string& model_dir);

  // Bytes that are not UTF-8 count as U+FFFD, one for each maximal broken sequence, and keep their
  // offsets. Special tokens written out in the text are recognised in any case;
  // add_special_tokens says whether the post-processor adds its own. Text of 4 GiB or more is
  // refused.
  Encoding encode(std::string_view text, bool add_special_tokens = true) const;

  // Ids without a token (padding rows of an embedding) are passed over. The result is valid UTF-8.
  std::string decode(std::span<const int32_t> ids, bool skip_special_tokens = true) const;

  // The token as the vocabulary spells it ("Ġhello", "<0x0A>"). Throws Error for an unknown id.
  std::string id_to_token(int32_t id) const;
  std::optional<int32_t> token_to_id(std::string_view token) const;

  // Of tokenizer_config.json; empty if it names none, or one that is no token.
  std::optional<int32_t> eos_id() const;
  std::optional<int32_t> bos_id() const;

  int64_t vocab_size() const;  // largest id + 1
  bool is_special(int32_t id) const;

 private:
  friend class StreamingDecoder;
  explicit Tokenizer(std::shared_ptr<const TokenizerParts> parts);
  std::shared_ptr<const TokenizerParts> parts_;
};

class DecodePipeline;

// Decodes ids as they come, and never returns half a character: bytes of an unfinished UTF-8
// sequence wait for the next id. What push and finish returned, put together, is what decode
// returns for all ids (if byte tokens like <0xE2> spell invalid UTF-8, only the number of U+FFFD
// may differ).
class StreamingDecoder {
 public:
  explicit StreamingDecoder(const Tokenizer& tokenizer, bool skip_special_tokens = true);
  ~StreamingDecoder();
  StreamingDecoder(StreamingDecoder&&) noexcept;

  std::string push(int32_t id);
  std::string finish();  // what still waits; an unfinished sequence comes out as U+FFFD

 private:
  std::shared_ptr<const TokenizerParts> parts_;
  std::unique_ptr<DecodePipeline> pipeline_;
  bool skip_special_tokens_;
};

}  // namespace graft
