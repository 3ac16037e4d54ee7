// The commands of the graft binary: graft <command> [arguments]. Each gets what stands after the
// command's name, returns the exit status, and throws Error for whatever goes wrong.
#pragma once

namespace graft {

// argv[0] is "graft <command>"; the arguments follow, as main() would get them.
int train_command(int argc, char** argv);
int generate_command(int argc, char** argv);
int combine_command(int argc, char** argv);
int convert_command(int argc, char** argv);
int merge_command(int argc, char** argv);
int tokenize_command(int argc, char** argv);
int info_command(int argc, char** argv);
int demo_command(int argc, char** argv);

}  // namespace graft
