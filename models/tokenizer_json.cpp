// Reads tokenizer.json in one pass. The vocabulary and the merges, nearly all of its bytes, go
// straight into tables: as JSON values they would take most of the loading time.
#include <fstream>
#include <sstream>

#include "models/tokenizer_parts.h"
#include "tensor/check.h"

namespace graft {

const Json& json_member(const Json& json, const char* key, const std::string& file) {
  CHECK(json.is_object(), file, ": expected an object with '", key, "', got ",
        json.dump().substr(0, 80));
  const auto it = json.find(key);
  CHECK(it != json.end(), file, ": '", key, "' is missing from ", json.dump().substr(0, 80));
  return *it;
}

bool json_bool(const Json& json, const char* key, bool otherwise, const std::string& file) {
  const auto it = json.find(key);
  if (it == json.end() || it->is_null()) return otherwise;
  CHECK(it->is_boolean(), file, ": '", key, "' is ", it->dump(), ", expected true or false");
  return it->get<bool>();
}

std::string json_string(const Json& json, const char* key, const std::string& file) {
  const Json& value = json_member(json, key, file);
  CHECK(value.is_string(), file, ": '", key, "' is ", value.dump().substr(0, 80),
        ", expected a string");
  return value.get<std::string>();
}

std::string json_type(const Json& json, const char* what, const std::string& file) {
  CHECK(json.is_object() && json.contains("type") && json["type"].is_string(), file, ": ", what,
        " is ", json.dump().substr(0, 80), ", expected an object with a type");
  return json["type"].get<std::string>();
}

namespace {

// Receives the parser's events. What lies in model.vocab and model.merges is taken here; everything
// else, and a null in place of those two, becomes the JSON value.
class Reader {
 public:
  Reader(Json& json, ModelTables& tables, const std::string& file)
      : dom_(json), tables_(tables), file_(file) {}

  bool null() {
    return other(nullptr, [&] { return dom_.null(); });
  }
  bool boolean(bool value) {
    return other(value, [&] { return dom_.boolean(value); });
  }
  bool number_integer(int64_t value) {
    return other(value, [&] { return dom_.number_integer(value); });
  }
  bool number_float(double value, const std::string& text) {
    return other(value, [&] { return dom_.number_float(value, text); });
  }
  bool number_unsigned(uint64_t value) {
    if (inside_ != Inside::vocab) {
      return other(value, [&] { return dom_.number_unsigned(value); });
    }
    if (value >= uint64_t(kMaxTokenId)) refuse(value);
    tables_.vocab.emplace_back(std::move(key_), int32_t(value));
    return true;
  }
  bool string(std::string& value) {
    if (inside_ == Inside::pair && pair_.size() < 2) {
      pair_.push_back(std::move(value));
      return true;
    }
    if (inside_ != Inside::merges) {
      return other(value, [&] { return dom_.string(value); });
    }
    const size_t space = value.find(' ');
    if (space == value.npos || value.find(' ', space + 1) != value.npos) refuse(value);
    tables_.merges.emplace_back(value.substr(0, space), value.substr(space + 1));
    return true;
  }
  bool binary(Json::binary_t& value) { return dom_.binary(value); }

  bool key(std::string& value) {
    if (inside_ == Inside::nothing && depth_ == 1) in_model_ = value == "model";
    key_ = value;
    return inside_ == Inside::vocab || dom_.key(value);
  }
  bool start_object(size_t size) {
    if (inside_ != Inside::nothing) refuse("an object");
    ++depth_;
    if (!at_member("vocab")) return dom_.start_object(size);
    inside_ = Inside::vocab;
    tables_.has_vocab = true;
    return dom_.null();
  }
  bool end_object() {
    --depth_;
    if (inside_ != Inside::vocab) return dom_.end_object();
    inside_ = Inside::nothing;
    return true;
  }
  bool start_array(size_t size) {
    if (inside_ == Inside::merges) {
      inside_ = Inside::pair;
      pair_.clear();
      return true;
    }
    if (inside_ != Inside::nothing) refuse("an array");
    ++depth_;
    if (!at_member("merges")) return dom_.start_array(size);
    inside_ = Inside::merges;
    tables_.has_merges = true;
    return dom_.null();
  }
  bool end_array() {
    if (inside_ == Inside::pair) {
      if (pair_.size() != 2) refuse(pair_);
      tables_.merges.emplace_back(std::move(pair_[0]), std::move(pair_[1]));
      inside_ = Inside::merges;
      return true;
    }
    --depth_;
    if (inside_ != Inside::merges) return dom_.end_array();
    inside_ = Inside::nothing;
    return true;
  }
  bool parse_error(size_t position, const std::string&, const nlohmann::json::exception&) {
    fail(file_, ": not JSON: syntax error at byte ", position);
  }

 private:
  enum class Inside { nothing, vocab, merges, pair };

  // The container that starts is the member `name` of the model (depth_ already counts it).
  bool at_member(const char* name) const { return in_model_ && depth_ == 3 && key_ == name; }

  template <class Forward>
  bool other(const Json& value, const Forward& forward) {
    if (inside_ != Inside::nothing) refuse(value);
    return forward();
  }

  [[noreturn]] void refuse(const Json& value) const {
    const std::string got = value.dump(-1, ' ', false, Json::error_handler_t::replace);
    if (inside_ == Inside::vocab) {
      fail(file_, ": model: vocab: token '", key_, "' has the id ", got,
           ", expected an integer from 0 to ", kMaxTokenId - 1);
    }
    fail(file_, ": model: merge ", tables_.merges.size(), " is or has ", got,
         ", expected a pair of tokens, or two tokens with a space between them");
  }

  nlohmann::detail::json_sax_dom_parser<Json> dom_;
  ModelTables& tables_;
  const std::string& file_;
  Inside inside_ = Inside::nothing;
  int depth_ = 0;
  bool in_model_ = false;
  std::string key_;
  std::vector<std::string> pair_;
};

}  // namespace

std::string read_text_file(const std::string& file) {
  std::ifstream in(file, std::ios::binary);
  CHECK(in, file, ": cannot be opened; expected a file of the model directory");
  std::ostringstream content;
  content << in.rdbuf();
  return std::move(content).str();
}

Json parse_tokenizer_json(ModelTables& tables, const std::string& file) {
  const std::string content = read_text_file(file);
  Json json;
  Reader reader(json, tables, file);
  Json::sax_parse(content, &reader);
  return json;
}

}  // namespace graft
