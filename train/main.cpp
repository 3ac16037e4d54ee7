// The graft binary: finds the command, and turns whatever goes wrong into one line on standard
// error.
#include <csignal>
#include <cstdio>
#include <cstring>
#include <cxxopts.hpp>
#include <filesystem>
#include <new>
#include <string>

#include "tensor/allocator.h"
#include "train/commands.h"
#include "train/options.h"

namespace graft {
namespace {

constexpr const char* kVersion = "0.1.0";

struct Command {
  const char* name;
  int (*run)(int argc, char** argv);
  const char* help;
};
constexpr Command kCommands[] = {
    {"train", train_command, "fine-tune a model: a LoRA adapter, or all weights"},
    {"generate", generate_command, "continue a prompt, with or without an adapter"},
    {"combine", combine_command, "one adapter out of several"},
    {"convert", convert_command, "an adapter in another format, as LoRA, or of lower rank"},
    {"merge", merge_command, "base and adapters as one model, with a certificate"},
    {"tokenize", tokenize_command, "show the tokens of a text"},
    {"info", info_command, "what a model has, and what training it takes"},
    {"demo", demo_command, "teach the bundled model something and show it"},
};

void print_help() {
  std::printf("graft: fine-tunes Llama, Qwen2 and Qwen3 models with LoRA\n\n");
  std::printf("usage: graft <command> [arguments]\n\n");
  for (const Command& command : kCommands) std::printf("  %-10s %s\n", command.name, command.help);
  std::printf("\ngraft <command> --help lists its arguments; graft --version\n");
}

int run(int argc, char** argv) {
  const std::string name = argc > 1 ? argv[1] : "";
  if (name == "--help" || name == "-h" || name == "help") return print_help(), 0;
  if (name == "--version") return std::printf("graft %s\n", kVersion), 0;
  for (const Command& command : kCommands)
    if (name == command.name) {
      std::string full_name = "graft " + name;
      argv[1] = full_name.data();
      return command.run(argc - 1, argv + 1);
    }
  if (name.empty()) throw UsageError("no command is given; see graft --help");
  throw UsageError("unknown command '" + name + "'; see graft --help");
}

// One line, whatever the message holds.
int complain(std::string message, int status) {
  for (char& c : message)
    if (c == '\n' || c == '\r') c = ' ';
  while (!message.empty() && message.back() == ' ') message.pop_back();
  std::fflush(stdout);
  std::fprintf(stderr, "graft: error: %s\n", message.c_str());
  return status;
}

int run_and_report(int argc, char** argv) {
  try {
    const int status = run(argc, argv);
    if (std::fflush(stdout) != 0 || std::ferror(stdout))
      return complain(concat("standard output cannot be written: ", std::strerror(errno)), 1);
    return status;
  } catch (const UsageError& error) {
    return complain(error.what(), 2);
  } catch (const cxxopts::exceptions::exception& error) {
    return complain(error.what(), 2);
  } catch (const OutOfMemory& error) {  // a table, and what to change
    std::fflush(stdout);
    std::fprintf(stderr, "graft: error: %s\n", error.what());
    return 1;
  } catch (const std::bad_alloc&) {
    return complain("out of memory; take a smaller model, batch or max_seq_length", 1);
  } catch (const std::filesystem::filesystem_error& error) {
    return complain(concat(error.path1().string(), error.path2().empty() ? "" : " to ",
                           error.path2().string(), ": ", error.code().message()),
                    1);
  } catch (const std::exception& error) {
    return complain(error.what(), 1);
  }
}

}  // namespace
}  // namespace graft

int main(int argc, char** argv) {
  std::signal(SIGPIPE, SIG_DFL);  // graft ... | head ends quietly
  std::signal(SIGXFSZ, SIG_IGN);  // a file size limit is an error with a message, as a full disk is
  return graft::run_and_report(argc, argv);
}
