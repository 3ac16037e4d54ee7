// `make mutants`: changes the kernels one place at a time and sees whether their tests notice. A
// mutant is compiled and tested in the fast build, and only where it survives there, in those of
// the race and the memory checker. Read before: sites.h, build.h. Arguments are name=value, see
// Arguments; the Makefile gives them.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "tests/cuda/mutants/build.h"
#include "tests/cuda/mutants/process.h"

namespace graft::mutants {
namespace {

constexpr size_t kLeastPerFile = 4;  // besides barriers and waits, all of which are drawn
constexpr double kWantedCaught = 0.95;
constexpr const char* kTable = "tests/cuda/mutants/tests.txt";
constexpr const char* kSurvivors = "tests/cuda/mutants/survivors.txt";

std::vector<std::string> words(const std::string& text) {
  std::istringstream in(text);
  std::vector<std::string> result;
  for (std::string word; in >> word;) result.push_back(word);
  return result;
}

struct Arguments {
  uint64_t seed = 1;
  size_t count = 0;
  unsigned jobs = 1;
  bool list = false;  // print the sites and end
  std::string folder;
  std::vector<std::string> files;
  std::vector<Kind> kinds;

  Arguments(int argc, char** argv) {
    std::map<std::string, std::string> given;
    for (int i = 1; i < argc; ++i) {
      const std::string argument = argv[i];
      const size_t equal = argument.find('=');
      if (equal == std::string::npos)
        throw std::runtime_error("mutants: argument is '" + argument + "', wanted name=value");
      given[argument.substr(0, equal)] = argument.substr(equal + 1);
    }
    seed = std::stoull(given["seed"]);
    count = std::stoull(given["count"]);
    jobs = unsigned(std::stoul(given["jobs"]));
    list = given.count("list") > 0;
    folder = given["folder"];
    files = words(given["files"]);
    for (const std::string& kind : words(given["kinds"]))
      kinds.push_back(
          {kind, given["compile." + kind], given["link." + kind], words(given["objects." + kind])});
  }
};

// Survivors that somebody looked at: stanzas of the file, the line before ("- ") and after ("+ "),
// and the reason ("why: ", and lines that begin with a space).
class KnownSurvivors {
 public:
  explicit KnownSurvivors(const std::string& path) {
    std::istringstream lines(read_file(path));
    std::string file, before, after;
    for (std::string line; std::getline(lines, line);) {
      if (line.empty() || line[0] == '#' || line[0] == ' ') continue;
      if (line.rfind("- ", 0) == 0)
        before = line.substr(2);
      else if (line.rfind("+ ", 0) == 0)
        after = line.substr(2);
      else if (line.rfind("why: ", 0) == 0)
        reasons_[{file, before, after}] = line.substr(5);
      else
        file = line;
    }
  }
  const std::string* reason(const std::string& file, const std::string& before,
                            const std::string& after) const {
    const auto found = reasons_.find({file, before, after});
    return found == reasons_.end() ? nullptr : &found->second;
  }
  // Entries for lines that the file does not have any more.
  void print_stale(const std::map<std::string, std::string>& texts) const {
    for (const auto& [key, reason] : reasons_) {
      const auto text = texts.find(std::get<0>(key));
      if (text != texts.end() && text->second.find(std::get<1>(key)) == std::string::npos)
        std::printf("%s: %s has no such line any more: %s\n", kSurvivors, text->first.c_str(),
                    std::get<1>(key).c_str());
    }
  }

 private:
  std::map<std::tuple<std::string, std::string, std::string>, std::string> reasons_;
};

// splitmix64 (Steele et al. 2014): the same draw from the same seed everywhere.
uint64_t next_random(uint64_t& state) {
  uint64_t z = state += 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

// One file's sites in the order in which they are drawn. The order depends on the file and the seed
// alone. Barriers and waits stand in a list of their own.
struct FileSites {
  std::string file, text;
  std::vector<Site> synchronizing, others;
  size_t next = 0;   // of `others`
  size_t quota = 0;  // how many of `others` are wanted

  FileSites(const std::string& file, uint64_t seed) : file(file), text(read_file(file)) {
    for (Site& site : find_sites(file, text))
      (site.synchronizes ? synchronizing : others).push_back(std::move(site));
    for (const char c : file) seed = seed * 1099511628211u + uint64_t(c);
    for (size_t i = others.size(); i > 1; --i)
      std::swap(others[i - 1], others[next_random(seed) % i]);
  }
};

// Shares `count` mutants among the files in proportion to their sites, kLeastPerFile at least.
void set_quotas(std::vector<FileSites>& files, size_t count) {
  size_t sites = 0, given = 0;
  for (FileSites& f : files) {
    sites += f.others.size();
    f.quota = std::min(kLeastPerFile, f.others.size());
    given += f.quota + f.synchronizing.size();
  }
  // To whoever is furthest below its share, one at a time.
  for (; given < count; ++given) {
    FileSites* poorest = nullptr;
    double least = 0;
    for (FileSites& f : files) {
      const double share = double(f.quota) / double(f.others.size());
      if (f.quota < f.others.size() && (!poorest || share < least)) poorest = &f, least = share;
    }
    if (!poorest) return;
    ++poorest->quota;
  }
}

class Run {
 public:
  explicit Run(const Arguments& arguments)
      : arguments_(arguments),
        builder_(arguments.folder, arguments.kinds, TestTable(kTable)),
        known_(kSurvivors) {}

  // The exit status.
  int operator()() {
    for (const std::string& file : arguments_.files) {
      files_.emplace_back(file, arguments_.seed);
      if (files_.back().synchronizing.empty() && files_.back().others.empty()) files_.pop_back();
    }
    set_quotas(files_, arguments_.count);
    for (FileSites& f : files_) {
      builder_.check_unchanged(f.file);
      for (Site& site : f.synchronizing) tasks_.push_back({&f, &site});
      for (size_t i = 0; i < f.quota; ++i) tasks_.push_back({&f, nullptr});
    }
    std::vector<std::thread> workers;
    for (unsigned i = 0; i < arguments_.jobs; ++i) workers.emplace_back([this] { work(); });
    for (std::thread& worker : workers) worker.join();
    return summary();
  }

 private:
  struct Task {
    FileSites* file;
    Site* site;  // null: the next of the file that makes a mutant
  };

  void work() {
    for (size_t i; (i = next_task_++) < tasks_.size();) {
      const Task& task = tasks_[i];
      if (task.site) {
        judge(*task.file, *task.site);
        continue;
      }
      const Site* site;
      while ((site = draw(*task.file)) && !judge(*task.file, *site)) {
      }
    }
  }

  const Site* draw(FileSites& f) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return f.next < f.others.size() ? &f.others[f.next++] : nullptr;
  }

  // Whether it counts: what the compiler refuses, or does not see, is no mutant.
  bool judge(const FileSites& f, const Site& site) {
    const Verdict verdict = builder_.judge(site, f.text, ++number_);
    const std::lock_guard<std::mutex> lock(mutex_);
    if (verdict.result == Verdict::kNoCompile || verdict.result == Verdict::kSameProgram) {
      (verdict.result == Verdict::kNoCompile ? refused_ : same_) += 1;
      return false;
    }
    const std::string before = line_around(f.text, site.begin);
    const std::string after = line_around(changed_text(f.text, site), site.begin);
    std::string end = "caught by " + verdict.by;
    if (verdict.result == Verdict::kSurvived) {
      const std::string* reason = known_.reason(f.file, before, after);
      end = reason ? "survived, harmless: " + *reason : "SURVIVED, unknown";
      (reason ? harmless_ : unknown_) += 1;
    } else {
      ++caught_;
    }
    std::printf("%s:%d: %s\n    %s\n    %s\n", f.file.c_str(), site.line, site.change.c_str(),
                after.c_str(), end.c_str());
    if (verdict.result == Verdict::kSurvived && !known_.reason(f.file, before, after))
      unknown_text_ += f.file + "\n- " + before + "\n+ " + after + "\nwhy: \n\n";
    std::fflush(stdout);
    return true;
  }

  int summary() {
    std::map<std::string, std::string> texts;
    for (const FileSites& f : files_) texts[f.file] = f.text;
    known_.print_stale(texts);
    const size_t all = caught_ + harmless_ + unknown_;
    if (unknown_ > 0)
      std::printf("\nneither caught nor in %s:\n\n%s", kSurvivors, unknown_text_.c_str());
    const double share = all ? double(caught_) / double(all) : 0;
    std::printf(
        "mutants: %zu of %zu caught (%.1f %%, wanted %.0f %%), %zu survived as known, %zu unknown; "
        "%zu more did not compile, %zu compiled to the same bytes; seed %llu\n",
        caught_, all, 100 * share, 100 * kWantedCaught, harmless_, unknown_, refused_, same_,
        static_cast<unsigned long long>(arguments_.seed));
    return unknown_ == 0 && share >= kWantedCaught ? 0 : 1;
  }

  const Arguments& arguments_;
  Builder builder_;
  const KnownSurvivors known_;
  std::vector<FileSites> files_;
  std::vector<Task> tasks_;
  std::atomic<size_t> next_task_{0};
  std::atomic<int> number_{0};
  std::mutex mutex_;  // files_[..].next and all below
  size_t caught_ = 0, harmless_ = 0, unknown_ = 0, refused_ = 0, same_ = 0;
  std::string unknown_text_;
};

int list(const Arguments& arguments) {
  for (const std::string& file : arguments.files) {
    const std::string text = read_file(file);
    for (const Site& site : find_sites(file, text))
      std::printf("%s:%d: %s\n    %s\n", file.c_str(), site.line, site.change.c_str(),
                  line_around(changed_text(text, site), site.begin).c_str());
  }
  return 0;
}

}  // namespace
}  // namespace graft::mutants

int main(int argc, char** argv) {
  using namespace graft::mutants;
  try {
    const Arguments arguments(argc, argv);
    if (arguments.list) return list(arguments);
    return Run(arguments)();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
