// Loading tokenizer.json, and the way of text through the parts. See models/tokenizer_parts.h.
#include "models/tokenizer.h"

#include <algorithm>
#include <fstream>

#include "models/tokenizer_parts.h"
#include "tensor/check.h"

namespace graft {

// Printable bytes stand for themselves, the others for characters from U+0100 on, in order.
const std::array<std::string, 256>& byte_level_alphabet() {
  static const auto alphabet = [] {
    std::array<std::string, 256> out;
    uint32_t next = 0x100;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
      text::append_utf8(out[byte], printable ? byte : next++);
    }
    return out;
  }();
  return alphabet;
}

int byte_level_byte(uint32_t code_point) {
  static const auto bytes = [] {
    std::array<int16_t, 0x200> out;
    out.fill(-1);
    for (int byte = 0; byte < 256; ++byte) {
      size_t length = 0;
      out[text::decode_at(byte_level_alphabet()[size_t(byte)], 0, &length)] = int16_t(byte);
    }
    return out;
  }();
  return code_point < bytes.size() ? bytes[code_point] : -1;
}

namespace {

const Json& member_or_null(const Json& json, const char* key) {
  static const Json null;
  const auto it = json.find(key);
  return it == json.end() ? null : *it;
}

std::optional<int32_t> find_token(const TokenizerParts& parts, std::string_view token) {
  if (const AddedToken* added = parts.added.find(token)) return added->id;
  return parts.bpe->token_to_id(token);
}

// The id of "eos_token": "</s>" or "eos_token": {"content": "</s>", ...}.
std::optional<int32_t> named_token(const TokenizerParts& parts, const Json& config, const char* key,
                                   const std::string& file) {
  const Json& value = member_or_null(config, key);
  if (value.is_null()) return std::nullopt;
  if (value.is_object()) return find_token(parts, json_string(value, "content", file));
  CHECK(value.is_string(), file, ": ", key, " is ", value.dump(),
        ", expected a string or an object with content");
  return find_token(parts, value.get_ref<const std::string&>());
}

void read_parts(TokenizerParts& parts) {
  const std::string& file = parts.file;
  ModelTables tables;
  const Json json = parse_tokenizer_json(tables, file);
  CHECK(json.is_object(), file, ": expected a JSON object");
  const Json& model = json_member(json, "model", file);
  const bool has_type = model.is_object() && model.contains("type");
  const std::string type = has_type ? json_type(model, "model", file) : std::string("BPE");
  CHECK(type == "BPE", file, ": model ", type, " is not supported, expected BPE");
  parts.bpe = std::make_unique<Bpe>(model, std::move(tables), file);
  parts.normalizer = make_normalizer(member_or_null(json, "normalizer"), file);
  parts.pre_tokenizer = make_pre_tokenizer(member_or_null(json, "pre_tokenizer"), file);
  parts.post_processor = make_post_processor(member_or_null(json, "post_processor"), file);
  parts.decoder = member_or_null(json, "decoder");
  DecodePipeline(parts.decoder, true, file);  // so that a decoder that is not supported fails here
  const Json& added = member_or_null(json, "added_tokens");
  if (added.is_null()) return;
  parts.added = AddedTokens(added, *parts.bpe, parts.normalizer.get(), file);
}

// A word cache for one encode, given back at its end.
class BorrowedCache {
 public:
  explicit BorrowedCache(const TokenizerParts& parts) : parts_(parts) {
    const std::lock_guard lock(parts.caches_mutex);
    if (parts.caches.empty()) {
      cache_ = std::make_unique<Bpe::WordCache>();
    } else {
      cache_ = std::move(parts.caches.back());
      parts.caches.pop_back();
    }
  }
  ~BorrowedCache() {
    const std::lock_guard lock(parts_.caches_mutex);
    parts_.caches.push_back(std::move(cache_));
  }
  Bpe::WordCache& operator*() { return *cache_; }

 private:
  const TokenizerParts& parts_;
  std::unique_ptr<Bpe::WordCache> cache_;
};

// Added tokens are looked for twice: in the raw text, and then in what the normalizer makes of
// each stretch between those found.
Pieces split_added_tokens(const TokenizerParts& parts, std::string_view text) {
  Pieces raw;
  raw.buffer = AlignedText::from(text);
  parts.added.split(raw.list, raw.buffer, 0, raw.buffer.text.size(), false);
  Pieces out;
  if (!parts.normalizer) out.buffer = std::move(raw.buffer);
  for (const Piece& piece : raw.list) {
    if (!parts.normalizer) {
      if (piece.token >= 0) {
        out.list.push_back(piece);
      } else {
        parts.added.split(out.list, out.buffer, piece.begin, piece.end, true);
      }
      continue;
    }
    const size_t begin = out.buffer.text.size();
    if (piece.token >= 0) {
      out.buffer.append(raw.buffer, piece.begin, piece.end);
      out.list.push_back({begin, out.buffer.text.size(), piece.token});
      continue;
    }
    AlignedText part = raw.buffer.slice(piece.begin, piece.end);
    parts.normalizer->apply(part);
    out.buffer.append(part, 0, part.text.size());
    parts.added.split(out.list, out.buffer, begin, out.buffer.text.size(), true);
  }
  return out;
}

std::vector<PlacedToken> tokenize_pieces(const TokenizerParts& parts, const Pieces& pieces) {
  std::vector<PlacedToken> out;
  out.reserve(pieces.buffer.text.size() / 3);
  BorrowedCache cache(parts);
  std::vector<Bpe::Symbol> symbols;
  const std::string_view text = pieces.buffer.text;
  const auto& spans = pieces.buffer.spans;
  for (const Piece& piece : pieces.list) {
    const std::string_view word = text.substr(piece.begin, piece.end - piece.begin);
    if (piece.token >= 0) {
      if (word.empty()) continue;
      out.push_back({piece.token, {spans[piece.begin].begin, spans[piece.end - 1].end}, word});
      continue;
    }
    symbols.clear();
    parts.bpe->tokenize(symbols, word, *cache);
    size_t at = piece.begin;
    for (const Bpe::Symbol& symbol : symbols) {
      const Span span{spans[at].begin, spans[at + symbol.length - 1].end};
      out.push_back({symbol.id, span, *parts.bpe->id_to_token(symbol.id)});
      at += symbol.length;
    }
  }
  return out;
}

}  // namespace

const std::string* TokenizerParts::token_text(int32_t id) const {
  if (const AddedToken* token = added.find(id)) return &token->content;
  return bpe->id_to_token(id);
}

Tokenizer::Tokenizer(std::shared_ptr<const TokenizerParts> parts) : parts_(std::move(parts)) {}

Tokenizer Tokenizer::load(const std::string& model_dir) {
  auto parts = std::make_shared<TokenizerParts>();
  parts->file = model_dir + "/tokenizer.json";
  try {
    read_parts(*parts);
  } catch (const nlohmann::json::exception& error) {
    fail(parts->file, ": ", error.what());
  }
  const std::string config_file = model_dir + "/tokenizer_config.json";
  if (std::ifstream(config_file)) {
    const Json config = Json::parse(read_text_file(config_file), nullptr, false);
    CHECK(config.is_object(), config_file, ": broken JSON, expected an object");
    parts->bos_id = named_token(*parts, config, "bos_token", config_file);
    parts->eos_id = named_token(*parts, config, "eos_token", config_file);
  }
  return Tokenizer(std::move(parts));
}

Encoding Tokenizer::encode(std::string_view text, bool add_special_tokens) const {
  CHECK(text.size() < UINT32_MAX, "encode: text has ", text.size(),
        " bytes, expected less than 4 GiB; encode it in parts");
  Pieces pieces = split_added_tokens(*parts_, text);
  if (parts_->pre_tokenizer) parts_->pre_tokenizer->apply(pieces);
  std::vector<PlacedToken> tokens = tokenize_pieces(*parts_, pieces);
  if (parts_->post_processor) {
    parts_->post_processor->apply(tokens, text, add_special_tokens);
  }
  Encoding out;
  out.ids.reserve(tokens.size());
  out.offsets.reserve(tokens.size());
  for (const PlacedToken& token : tokens) {
    out.ids.push_back(token.id);
    out.offsets.emplace_back(token.span.begin, token.span.end);
  }
  return out;
}

std::string Tokenizer::decode(std::span<const int32_t> ids, bool skip_special_tokens) const {
  DecodePipeline pipeline(parts_->decoder, false, parts_->file);
  std::string out;
  for (const int32_t id : ids) {
    const std::string* token = parts_->token_text(id);
    if (!token || (skip_special_tokens && is_special(id))) continue;
    pipeline.push(out, *token);
  }
  pipeline.finish(out);
  return out;
}

std::string Tokenizer::id_to_token(int32_t id) const {
  const std::string* token = parts_->token_text(id);
  CHECK(token, parts_->file, ": id ", id, " has no token; ids go from 0 to ", vocab_size() - 1);
  return *token;
}

std::optional<int32_t> Tokenizer::token_to_id(std::string_view token) const {
  return find_token(*parts_, token);
}

std::optional<int32_t> Tokenizer::eos_id() const { return parts_->eos_id; }
std::optional<int32_t> Tokenizer::bos_id() const { return parts_->bos_id; }

int64_t Tokenizer::vocab_size() const {
  return std::max(parts_->bpe->largest_id(), parts_->added.largest_id()) + 1;
}

bool Tokenizer::is_special(int32_t id) const {
  const AddedToken* token = parts_->added.find(id);
  return token && token->special;
}

StreamingDecoder::StreamingDecoder(const Tokenizer& tokenizer, bool skip_special_tokens)
    : parts_(tokenizer.parts_),
      pipeline_(std::make_unique<DecodePipeline>(parts_->decoder, true, parts_->file)),
      skip_special_tokens_(skip_special_tokens) {}
StreamingDecoder::~StreamingDecoder() = default;
StreamingDecoder::StreamingDecoder(StreamingDecoder&&) noexcept = default;

std::string StreamingDecoder::push(int32_t id) {
  const std::string* token = parts_->token_text(id);
  const AddedToken* added = parts_->added.find(id);
  std::string out;
  if (!token || (skip_special_tokens_ && added && added->special)) return out;
  pipeline_->push(out, *token);
  return out;
}

std::string StreamingDecoder::finish() {
  std::string out;
  pipeline_->finish(out);
  return out;
}

}  // namespace graft
