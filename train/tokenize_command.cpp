// graft tokenize: what a model's tokenizer makes of a text, one line per token or only the ids.
#include <cstdio>
#include <cxxopts.hpp>
#include <iostream>
#include <iterator>

#include "models/tokenizer.h"
#include "models/weights.h"
#include "tensor/check.h"
#include "train/commands.h"
#include "train/options.h"

namespace graft {
namespace {

// Control characters and the backslash as escapes, so that a token stays on its line.
std::string visible(const std::string& token) {
  std::string out;
  char hex[8];
  for (const char c : token) {
    if (c == '\n') {
      out += "\\n";
    } else if (c == '\r') {
      out += "\\r";
    } else if (c == '\t') {
      out += "\\t";
    } else if (c == '\\') {
      out += "\\\\";
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) {
      std::snprintf(hex, sizeof hex, "\\x%02X", unsigned(c));
      out += hex;
    } else {
      out += c;
    }
  }
  return out;
}

void print_ids(const Encoding& encoding) {
  for (size_t i = 0; i < encoding.ids.size(); ++i) {
    std::printf("%s%d", i ? " " : "", int(encoding.ids[i]));
  }
  std::printf("\n");
}

void print_tokens(const Tokenizer& tokenizer, const Encoding& encoding) {
  for (size_t i = 0; i < encoding.ids.size(); ++i) {
    const auto [begin, end] = encoding.offsets[i];
    std::printf("%7d\t%s\t%lld..%lld\n", int(encoding.ids[i]),
                visible(tokenizer.id_to_token(encoding.ids[i])).c_str(), (long long)begin,
                (long long)end);
  }
}

}  // namespace

int tokenize_command(int argc, char** argv) {
  cxxopts::Options options(
      "graft tokenize",
      "Shows the tokens of TEXT, or of standard input taken as it is when TEXT is -: id, token, "
      "bytes of the text.");
  options.positional_help("TEXT|-");
  options.add_options()("model", "directory with tokenizer.json", cxxopts::value<std::string>(),
                        "DIR")("ids", "print only the ids, on one line")(
      "no-special-tokens", "leave out what the tokenizer puts around a text")(
      "text", "", cxxopts::value<std::string>())("h,help", "print this");
  options.parse_positional({"text"});
  try {
    const auto args = options.parse(argc, argv);
    if (args.count("help")) {
      std::printf("%s", options.help().c_str());
      return 0;
    }
    CHECK(args.count("model"), "tokenize: --model DIR is missing");
    CHECK(args.count("text") == 1 && args.unmatched().empty(),
          "tokenize: expected one TEXT, or - for standard input; quote a text with spaces");
    std::string text = args["text"].as<std::string>();
    if (text == "-") {
      text.assign(std::istreambuf_iterator<char>(std::cin), std::istreambuf_iterator<char>());
      CHECK(!std::ferror(stdin), "tokenize: standard input cannot be read");
    }
    const Tokenizer tokenizer = Tokenizer::load(resolve_model(args["model"].as<std::string>()));
    const Encoding encoding = tokenizer.encode(text, !args.count("no-special-tokens"));
    if (args.count("ids")) {
      print_ids(encoding);
    } else {
      print_tokens(tokenizer, encoding);
    }
  } catch (const cxxopts::exceptions::exception& error) {
    const std::string hint = unknown_flag_hint(options.help(), {argv + 1, argv + argc});
    throw UsageError(
        concat("tokenize: ", hint.empty() ? error.what() : hint, "; see graft tokenize --help"));
  }
  return 0;
}

}  // namespace graft
