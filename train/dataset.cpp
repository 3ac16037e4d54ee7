#include "train/dataset.h"

#include <glob.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <sstream>

#include "autograd/ops.h"
#include "models/tokenizer_text.h"
#include "tensor/check.h"
#include "tensor/random.h"

namespace graft {
namespace {

namespace fs = std::filesystem;
constexpr int32_t kIgnore = ops::kIgnoreLabel;

std::string thousands(int64_t n) {
  std::string text = std::to_string(n);
  for (int64_t i = int64_t(text.size()) - 3; i > 0; i -= 3) text.insert(size_t(i), ",");
  return text;
}

std::string read_text(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  CHECK(file, "data: ", path, ": cannot be opened");
  std::ostringstream text;
  text << file.rdbuf();
  CHECK(!file.bad(), "data: ", path, ": cannot be read");
  std::string bytes = std::move(text).str();
  if (bytes.rfind("\xEF\xBB\xBF", 0) == 0) bytes.erase(0, 3);  // byte order mark
  return bytes;
}

TextEncoder::Tokens encode_at(const TextEncoder& tokenizer, const std::string& text,
                              const std::string& where) {
  CHECK(tokenizer.eos_id >= 0,
        "data: the tokenizer has no eos_token, which ends every example; "
        "set eos_token in tokenizer_config.json");
  try {
    return tokenizer.encode(text);
  } catch (const Error& error) {
    fail(where, ": ", error.what());
  }
}

// The number of the line that holds the first bytes that are not UTF-8.
int64_t broken_line(const std::string& bytes) {
  size_t at = 0, length = 0;
  while (at < bytes.size() &&
         text::classify_utf8(std::string_view(bytes).substr(at), &length) == text::Utf8::valid)
    at += length;
  return 1 + std::count(bytes.begin(), bytes.begin() + int64_t(at), '\n');
}

// Cuts the row to max_seq_length, checks that something is left to learn, and keeps it.
void finish_row(Dataset& dataset, Row row, int64_t max_seq_length, const std::string& where) {
  const int64_t length = int64_t(row.ids.size());
  const bool learned_before = row.num_label_tokens() > 0;
  if (length > max_seq_length) {
    row.ids.resize(size_t(max_seq_length));
    row.labels.resize(size_t(max_seq_length));
    ++dataset.truncated;
  }
  CHECK(row.num_label_tokens() > 0, where, ": no token of this row is trained",
        learned_before
            ? concat(" once it is cut from ", length, " to max_seq_length ", max_seq_length,
                     " tokens; raise max_seq_length or shorten the prompt")
            : concat(": it has ", length, length == 1 ? " token" : " tokens",
                     "; give it text or remove it"));
  dataset.rows.push_back(std::move(row));
}

// One file of JSON lines; all rows of all files have one schema.
class JsonLines {
 public:
  JsonLines(Dataset& dataset, const TextEncoder& tokenizer, int64_t max_seq_length)
      : dataset_(dataset), tokenizer_(tokenizer), max_seq_length_(max_seq_length) {}

  void read(const std::string& path) {
    const std::string text = read_text(path);
    int64_t line_number = 0;
    for (size_t begin = 0; begin < text.size();) {
      const size_t end = std::min(text.find('\n', begin), text.size());
      const std::string line = text.substr(begin, end - begin);
      begin = end + 1;
      ++line_number;
      if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
      read_line(line, concat(path, ":", line_number));
    }
  }

 private:
  void read_line(const std::string& line, const std::string& where) {
    nlohmann::json object;
    try {
      object = nlohmann::json::parse(line);
    } catch (const nlohmann::json::parse_error& error) {
      const std::string what = error.what();
      CHECK(what.find("surrogate") == std::string::npos, where, ": half a surrogate pair (byte ",
            error.byte,
            "), which is no character; expected both halves, \\ud83d\\ude00, or the character "
            "itself");
      fail(where, ": not JSON (byte ", error.byte, "); expected one object per line, such as ",
           kExample);
    }
    CHECK(object.is_object(), where, ": got ", object.type_name(), ", expected an object such as ",
          kExample);
    const bool text = object.contains("text"),
               pair = object.contains("prompt") || object.contains("completion");
    CHECK(text != pair, where,
          text ? ": has text and prompt or completion; leave one of the two"
               : ": has neither text nor prompt and completion",
          text ? "" : concat(" (keys: ", keys(object), "); expected an object such as ", kExample));
    const std::string schema = text ? "text" : "prompt and completion";
    if (schema_.empty()) {
      schema_ = schema;
      schema_where_ = where;
    }
    CHECK(schema == schema_, where, ": has ", schema, ", but ", schema_where_, " has ", schema_,
          "; all rows must be of one kind");
    const auto is_empty = [&](const char* key) { return field(object, key, where).empty(); };
    CHECK(text ? !is_empty("text") : !(is_empty("prompt") && is_empty("completion")), where,
          ": the row is empty: no token of it is worth training; give it text or remove it");
    if (text)
      add_text_row(dataset_, field(object, "text", where), tokenizer_, max_seq_length_, where);
    else
      add_completion_row(dataset_, field(object, "prompt", where),
                         field(object, "completion", where), tokenizer_, max_seq_length_, where);
  }

  static std::string field(const nlohmann::json& object, const char* key,
                           const std::string& where) {
    CHECK(object.contains(key), where, ": ", key, " is missing; expected an object such as ",
          kExample);
    CHECK(object[key].is_string(), where, ": ", key, ": got ", object[key].type_name(),
          ", expected a string");
    return object[key];
  }

  static std::string keys(const nlohmann::json& object) {
    std::string names;
    for (const auto& item : object.items()) names += (names.empty() ? "" : ", ") + item.key();
    return names.empty() ? "none" : names;
  }

  static constexpr const char* kExample =
      R"({"text": "..."} or {"prompt": "...", "completion": "..."})";
  Dataset& dataset_;
  const TextEncoder& tokenizer_;
  int64_t max_seq_length_;
  std::string schema_, schema_where_;
};

void append_eos(Row& row, const TextEncoder& tokenizer) {
  if (row.ids.empty() || row.ids.back() != tokenizer.eos_id) {
    row.ids.push_back(tokenizer.eos_id);
    row.labels.push_back(tokenizer.eos_id);
  }
  row.labels.back() = tokenizer.eos_id;
}

}  // namespace

int64_t Row::num_label_tokens() const {
  if (labels.empty()) return 0;
  return std::count_if(labels.begin() + 1, labels.end(), [](int32_t l) { return l != kIgnore; });
}

int64_t Dataset::num_tokens() const {
  int64_t tokens = 0;
  for (const Row& row : rows) tokens += int64_t(row.ids.size());
  return tokens;
}

int64_t Dataset::num_label_tokens() const {
  int64_t tokens = 0;
  for (const Row& row : rows) tokens += row.num_label_tokens();
  return tokens;
}

int64_t Dataset::longest_row() const {
  size_t longest = 0;
  for (const Row& row : rows) longest = std::max(longest, row.ids.size());
  return int64_t(longest);
}

uint64_t Dataset::fingerprint() const {
  uint64_t hash = 0xcbf29ce484222325u;  // FNV-1a, a word at a time
  const auto add = [&](uint64_t word) { hash = (hash ^ word) * 0x100000001b3u; };
  for (const Row& row : rows) {
    add(row.ids.size());
    for (size_t i = 0; i < row.ids.size(); ++i)
      add(uint64_t(uint32_t(row.ids[i])) << 32 | uint32_t(row.labels[i]));
  }
  return hash;
}

std::string Dataset::summary(int64_t max_seq_length) const {
  std::string text = thousands(int64_t(rows.size())) + (rows.size() == 1 ? " row, " : " rows, ") +
                     thousands(num_tokens()) + " tokens (" + thousands(num_label_tokens()) +
                     " trained)";
  if (truncated)
    text += ", " + thousands(truncated) + " truncated to " + std::to_string(max_seq_length);
  if (straddling)
    text += ", " + thousands(straddling) +
            " with a token on the border of prompt and completion (not trained)";
  return text;
}

void add_document(Dataset& dataset, const std::string& text, const TextEncoder& tokenizer,
                  int64_t max_seq_length, const std::string& where) {
  std::vector<int32_t> ids = encode_at(tokenizer, text, where).ids;
  if (ids.empty() || ids.back() != tokenizer.eos_id) ids.push_back(tokenizer.eos_id);
  const int64_t total = int64_t(ids.size());
  for (int64_t begin = 0; begin < total;) {
    int64_t end = std::min(begin + max_seq_length, total);
    // A last row of one token has nothing to predict it from: the row before lends it one.
    if (total - end == 1 && end - begin > 2) --end;
    if (total - begin == 1 && begin > 0) break;
    Row row;
    row.ids.assign(ids.begin() + begin, ids.begin() + end);
    row.labels = row.ids;
    finish_row(dataset, std::move(row), max_seq_length, where);
    begin = end;
  }
}

void add_text_row(Dataset& dataset, const std::string& text, const TextEncoder& tokenizer,
                  int64_t max_seq_length, const std::string& where) {
  Row row;
  row.ids = encode_at(tokenizer, text, where).ids;
  row.labels = row.ids;
  append_eos(row, tokenizer);
  finish_row(dataset, std::move(row), max_seq_length, where);
}

void add_completion_row(Dataset& dataset, const std::string& prompt, const std::string& completion,
                        const TextEncoder& tokenizer, int64_t max_seq_length,
                        const std::string& where) {
  const TextEncoder::Tokens tokens = encode_at(tokenizer, prompt + completion, where);
  const int64_t border = int64_t(prompt.size());
  const int64_t length = border + int64_t(completion.size());
  Row row;
  row.ids = tokens.ids;
  bool straddles = false;
  for (size_t i = 0; i < tokens.ids.size(); ++i) {
    const auto [begin, end] = tokens.offsets[i];
    // Special tokens that the post-processor adds stand for no bytes and are not learned.
    const bool in_completion = begin >= border && end > begin && begin < length;
    row.labels.push_back(in_completion ? tokens.ids[i] : kIgnore);
    straddles |= begin < border && end > border;
  }
  append_eos(row, tokenizer);
  finish_row(dataset, std::move(row), max_seq_length, where);
  dataset.straddling += straddles;
}

std::vector<std::string> expand_sources(const std::vector<std::string>& sources) {
  const auto is_data = [](const fs::path& path) {
    return path.extension() == ".txt" || path.extension() == ".jsonl";
  };
  std::vector<std::string> files;
  for (const std::string& source : sources) {
    std::vector<std::string> found;
    if (fs::is_directory(source)) {
      for (const auto& entry : fs::directory_iterator(source))
        if (is_data(entry.path())) found.push_back(entry.path());
      CHECK(!found.empty(), "data: ", source, ": no .txt or .jsonl file in this folder");
      std::sort(found.begin(), found.end());
    } else if (fs::exists(source)) {
      CHECK(is_data(source), "data: ", source,
            ": unknown kind of file; expected *.txt (text) or *.jsonl (an object per line)");
      found.push_back(source);
    } else {
      glob_t matches{};
      const bool any = glob(source.c_str(), 0, nullptr, &matches) == 0;
      if (any) found.assign(matches.gl_pathv, matches.gl_pathv + matches.gl_pathc);
      globfree(&matches);
      CHECK(any, "data: ", source, ": no such file; expected *.txt or *.jsonl");
      for (const std::string& path : found)
        CHECK(is_data(path), "data: ", path,
              ": unknown kind of file; expected *.txt (text) or *.jsonl (an object per line)");
    }
    files.insert(files.end(), found.begin(), found.end());
  }
  return files;
}

Dataset load_dataset(const std::vector<std::string>& sources, const TextEncoder& tokenizer,
                     int64_t max_seq_length) {
  Dataset dataset;
  JsonLines json_lines(dataset, tokenizer, max_seq_length);
  for (const std::string& path : expand_sources(sources)) {
    const size_t before = dataset.rows.size();
    if (fs::path(path).extension() == ".txt") {
      const std::string document = read_text(path);
      CHECK(!document.empty(), "data: ", path, ": is empty; expected text");
      CHECK(text::is_valid_utf8(document), "data: ", path, ":", broken_line(document),
            ": is not UTF-8; convert the file, for instance with iconv -t UTF-8");
      add_document(dataset, document, tokenizer, max_seq_length, path);
    } else {
      json_lines.read(path);
    }
    CHECK(dataset.rows.size() > before, "data: ", path, ": is empty; expected an object per line");
  }
  CHECK(!dataset.rows.empty(), "data: no files are given");
  return dataset;
}

Dataset split_off(Dataset& train, double eval_split, uint64_t seed) {
  const int64_t rows = int64_t(train.rows.size());
  CHECK(rows >= 2, "eval_split: the data has ", rows, " row; at least 2 are needed");
  const double asked =
      eval_split < 1 ? std::max(1.0, std::round(eval_split * double(rows))) : eval_split;
  CHECK(asked < double(rows), "eval_split: ", asked, " rows are asked for, but the data has ",
        rows);
  const int64_t wanted = int64_t(asked);

  std::vector<int64_t> order(static_cast<size_t>(rows));
  std::iota(order.begin(), order.end(), 0);
  Random random(seed, /*stream=*/uint64_t(1) << 63);  // those below are the epochs' orders
  for (int64_t i = 0; i < wanted; ++i)
    std::swap(order[size_t(i)], order[size_t(i) + random.below(uint64_t(rows - i))]);
  std::vector<bool> held_out(static_cast<size_t>(rows));
  for (int64_t i = 0; i < wanted; ++i) held_out[size_t(order[size_t(i)])] = true;

  Dataset eval;
  std::vector<Row> kept;
  for (size_t i = 0; i < train.rows.size(); ++i)
    (held_out[i] ? eval.rows : kept).push_back(std::move(train.rows[i]));
  train.rows = std::move(kept);
  return eval;
}

}  // namespace graft
