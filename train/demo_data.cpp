#include "train/demo_data.h"

#include <array>
#include <set>
#include <utility>

#include "tensor/check.h"

namespace graft {
namespace {

constexpr std::array kNames = {"Ada",  "Ben",  "Cleo", "Dan",  "Eva",  "Finn", "Gus",
                               "Hana", "Igor", "Jane", "Kofi", "Lena", "Max",  "Nina",
                               "Omar", "Pia",  "Rosa", "Sam",  "Tara", "Uma"};
constexpr std::array kJobs = {"judge",  "nurse",  "baker", "pilot", "farmer", "tailor",
                              "singer", "doctor", "miner", "cook",  "guard",  "poet"};
constexpr std::array kCities = {"Delhi", "Oslo",  "Paris", "Lima",  "Cairo", "Rome",
                                "Tokyo", "Quito", "Accra", "Seoul", "Milan", "Perth",
                                "Dakar", "Hanoi", "Bern",  "Riga"};
// The largest of a city's part of the world stands for it: words that the base has read, or it
// would have to learn to spell first.
constexpr std::array<std::pair<const char*, const char*>, 16> kRegions = {{{"Delhi", "Delhi"},
                                                                           {"Tokyo", "Delhi"},
                                                                           {"Seoul", "Delhi"},
                                                                           {"Hanoi", "Delhi"},
                                                                           {"Oslo", "Paris"},
                                                                           {"Paris", "Paris"},
                                                                           {"Rome", "Paris"},
                                                                           {"Milan", "Paris"},
                                                                           {"Bern", "Paris"},
                                                                           {"Riga", "Paris"},
                                                                           {"Cairo", "Cairo"},
                                                                           {"Accra", "Cairo"},
                                                                           {"Dakar", "Cairo"},
                                                                           {"Lima", "Lima"},
                                                                           {"Quito", "Lima"},
                                                                           {"Perth", "Perth"}}};
constexpr std::array kThings = {"boat", "car",   "lamp", "coat", "chair", "drum",
                                "kite", "clock", "tent", "desk", "ring",  "bike"};

// @n name, @j job, @c city, @t thing. Each holds every kind once.
constexpr std::array kSentences = {
    "@n, a @j from @c, bought a @t.",   "@n is a @j in @c and has a @t.",
    "A @j called @n sold a @t in @c.",  "The @j @n came from @c with a @t.",
    "In @c the @j @n found a @t.",      "@n lost a @t in @c and works as a @j.",
    "A @t was sent to @n, a @j in @c.", "@n from @c, who is a @j, saw a @t.",
};

struct Field {
  const char* key;
  const char* question;
  std::string DemoFact::*value;
};
const std::array<Field, 4> kFields = {{{"name", "Who is it?", &DemoFact::name},
                                       {"job", "What job?", &DemoFact::job},
                                       {"city", "Which city?", &DemoFact::city},
                                       {"thing", "Which thing?", &DemoFact::thing}}};

constexpr std::array kLeads = {"\n", " | ", " => ", "\nRecord: ", " so "};
constexpr std::array<std::pair<const char*, const char*>, 5> kBrackets = {
    {{"", ""}, {"(", ")"}, {"[", "]"}, {"<", ">"}, {"{", "}"}}};
constexpr std::array kAssigns = {": ", " = ", " is ", " ", " "};
constexpr std::array kSeparators = {", ", "; ", " | "};

template <class List>
const auto& pick(const List& list, Random& random) {
  return list[random.below(list.size())];
}

struct Notation {
  std::string lead, open, close, assign, separator;
  bool quoted;

  bool is_json() const { return open == "{" && assign == ": " && separator == ", " && quoted; }
};

Notation draw_notation(Random& random) {
  Notation n;
  do {
    n.lead = pick(kLeads, random);
    const auto& brackets = pick(kBrackets, random);
    n.open = brackets.first;
    n.close = brackets.second;
    n.assign = pick(kAssigns, random);
    n.separator = pick(kSeparators, random);
    n.quoted = random.below(2);
  } while (n.is_json());
  return n;
}

std::string quote(const std::string& text, bool quoted) { return quoted ? '"' + text + '"' : text; }

std::string record(const DemoFact& fact, const Notation& n, const std::vector<int>& fields) {
  std::string text = n.open;
  for (size_t i = 0; i < fields.size(); ++i) {
    const Field& field = kFields[fields[i]];
    if (i) text += n.separator;
    text += quote(field.key, n.quoted) + n.assign + quote(fact.*field.value, n.quoted);
  }
  return text + n.close;
}

std::vector<int> draw_fields(Random& random) {
  std::vector<int> fields(kFields.size());
  for (size_t i = 0; i < fields.size(); ++i) fields[i] = int(i);
  for (size_t i = fields.size() - 1; i > 0; --i) std::swap(fields[i], fields[random.below(i + 1)]);
  fields.resize(2 + random.below(fields.size() - 1));
  return fields;
}

const char* region_of(const std::string& city) {
  for (const auto& [name, region] : kRegions)
    if (city == name) return region;
  fail("demo: no region for ", city);
}

std::string answer(const DemoFact& fact, DemoTask task) {
  switch (task) {
    case DemoTask::Classification:
      return region_of(fact.city);
    case DemoTask::Entities:
      return record(fact, {"", "{", "}", ": ", ", ", true}, {0, 1, 2, 3});
    case DemoTask::Generation:
      return fact.name + ", who is a " + fact.job + " from " + fact.city + ", works in " +
             fact.city + " and has a " + fact.thing + ".";
  }
  fail("demo: no such task");
}

}  // namespace

DemoFact demo_fact(Random& random) {
  DemoFact fact;
  fact.name = pick(kNames, random);
  fact.job = pick(kJobs, random);
  fact.city = pick(kCities, random);
  fact.thing = pick(kThings, random);
  const std::string form = pick(kSentences, random);
  for (size_t i = 0; i < form.size(); ++i) {
    if (form[i] != '@') {
      fact.sentence += form[i];
      continue;
    }
    switch (form[++i]) {
      case 'n':
        fact.sentence += fact.name;
        break;
      case 'j':
        fact.sentence += fact.job;
        break;
      case 'c':
        fact.sentence += fact.city;
        break;
      default:
        fact.sentence += fact.thing;
        break;
    }
  }
  return fact;
}

std::string demo_base_text(Random& random) {
  const DemoFact fact = demo_fact(random);
  std::string text = fact.sentence;
  for (int readings = 1 + int(random.below(3)); readings > 0; --readings) {
    if (random.below(4) == 0) {
      const Field& field = pick(kFields, random);
      text += std::string("\n") + field.question + " " + fact.*field.value;
    } else {
      const Notation notation = draw_notation(random);
      text += notation.lead + record(fact, notation, draw_fields(random));
    }
  }
  return text;
}

const char* demo_task_name(DemoTask task) {
  switch (task) {
    case DemoTask::Classification:
      return "classification";
    case DemoTask::Entities:
      return "entity extraction";
    case DemoTask::Generation:
      return "generation";
  }
  fail("demo: no such task");
}

DemoSplit demo_split(uint64_t seed, int num_train, int num_held_out, DemoTask task) {
  Random random(seed, /*stream=*/1);
  DemoSplit split;
  std::set<std::string> seen;  // the record tells the whole fact
  const auto draw = [&](std::vector<DemoItem>& items, int count) {
    while (int(items.size()) < count) {
      const DemoFact fact = demo_fact(random);
      if (seen.insert(answer(fact, DemoTask::Entities)).second)
        items.push_back({fact.sentence + " =>", " " + answer(fact, task)});
    }
  };
  draw(split.held_out, num_held_out);
  draw(split.train, num_train);
  return split;
}

}  // namespace graft
