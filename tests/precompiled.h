// What most tests include, parsed once for all of them (Makefile). Every file includes what it
// uses.
#ifndef GRAFT_TESTS_PRECOMPILED_H
#define GRAFT_TESTS_PRECOMPILED_H

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "autograd/tape.h"

#endif
