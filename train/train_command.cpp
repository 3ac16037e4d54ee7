// graft train [config.yaml] [flags]
#include <signal.h>

#include <cstdio>

#include "train/commands.h"
#include "train/finetune.h"

namespace graft {
namespace {

// A signal handler reaches nothing but what has static storage.
volatile std::sig_atomic_t interrupt_seen = 0;

// The first Ctrl-C lets the step finish and saves; SA_RESETHAND leaves the second to the system,
// which ends the process.
void catch_interrupt() {
  struct sigaction action {};
  action.sa_handler = [](int) { interrupt_seen = 1; };
  action.sa_flags = int(SA_RESETHAND);
  sigaction(SIGINT, &action, nullptr);
}

}  // namespace

int train_command(int argc, char** argv) {
  CommandLine rest;
  const TrainOptions options = read_train_options({argv + 1, argv + argc}, rest);
  if (rest.help) {
    std::printf("%s", train_flags_help().c_str());
    return 0;
  }
  if (argc < 2)
    throw UsageError("train: nothing to do; give a config file or flags (graft train --help)");
  catch_interrupt();
  RunControl control;
  control.console = stdout;
  control.interrupt = &interrupt_seen;
  return finetune(options, control).interrupted ? 130 : 0;
}

}  // namespace graft
