// Graphs: the work of one capture, run in the order in which it was captured. The parameters are
// those of the capture; memory that was freed since is found before the work that points to it
// runs.
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/emulator/internal.h"
#include "cuda/emulator/streams.h"

struct CUgraph_st {
  std::vector<emu::Node> nodes;
};
struct CUgraphExec_st {
  std::vector<emu::Node> nodes;
};

namespace emu {
namespace {

std::set<const void*>& live() {
  static auto& s = *new std::set<const void*>;
  return s;
}
template <class T>
T* track(T* object) {
  live().insert(object);
  return object;
}

std::string describe(const Work& work) {
  switch (work.kind) {
    case Work::kKernel:
      return work.kernel ? "kernel " + kernel_name(work.kernel) : "a product";
    case Work::kFill:
      return "a fill";
    default:
      return "a copy";
  }
}

cudaError_t run(const std::vector<Node>& nodes) {
  for (size_t i = 0; i < nodes.size(); ++i) {
    for (auto [address, serial] : nodes[i].uses) {
      const Allocation* a = find_device_allocation(reinterpret_cast<const void*>(address));
      if (a && a->serial == serial) continue;
      report_failure("graph: node " + std::to_string(i) + ", " + describe(nodes[i].work) +
                     ", was captured with device memory that has been freed since");
      return set_last_error(cudaErrorLaunchFailure);
    }
    if (cudaError_t e = nodes[i].work.run()) return e;
  }
  return cudaSuccess;
}

}  // namespace

Node make_node(Work work) {
  Node node{std::move(work), {}};
  for (uintptr_t word : node.work.words)
    if (const Allocation* a = find_device_allocation(reinterpret_cast<const void*>(word)))
      node.uses.push_back({word, a->serial});
  return node;
}

cudaGraph_t make_graph(std::vector<Node> nodes) { return track(new CUgraph_st{std::move(nodes)}); }

}  // namespace emu

using namespace emu;

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* count) {
  if (!live().count(graph) || nodes || !count) return set_last_error(cudaErrorInvalidValue);
  *count = graph->nodes.size();
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  if (!exec || !live().count(graph)) return set_last_error(cudaErrorInvalidValue);
  *exec = track(new CUgraphExec_st{graph->nodes});
  return cudaSuccess;
}

cudaError_t cudaGraphExecUpdate(cudaGraphExec_t exec, cudaGraph_t graph,
                                cudaGraphExecUpdateResultInfo* result) {
  if (!result || !live().count(exec) || !live().count(graph))
    return set_last_error(cudaErrorInvalidValue);
  *result = {cudaGraphExecUpdateSuccess, nullptr, nullptr};
  if (exec->nodes.size() != graph->nodes.size())
    result->result = cudaGraphExecUpdateErrorTopologyChanged;
  for (size_t i = 0; !result->result && i < graph->nodes.size(); ++i) {
    const Work &was = exec->nodes[i].work, &is = graph->nodes[i].work;
    const auto is_copy = [](const Work& w) {
      return w.kind != Work::kKernel && w.kind != Work::kFill;
    };
    if (was.kind != is.kind)
      result->result = is_copy(was) && is_copy(is) ? cudaGraphExecUpdateErrorParametersChanged
                                                   : cudaGraphExecUpdateErrorNodeTypeChanged;
  }
  if (result->result) return set_last_error(cudaErrorGraphExecUpdateFailure);
  exec->nodes = graph->nodes;
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  if (!live().count(exec)) return set_last_error(cudaErrorInvalidValue);
  ++stats().graph_launches;
  // In a capture the graph becomes a node, with all the memory of its own nodes.
  Work work{Work::kKernel, nullptr, [nodes = exec->nodes] { return run(nodes); }, {}};
  for (const Node& n : exec->nodes)
    for (auto use : n.uses) work.words.push_back(use.address);
  return submit(stream, std::move(work));
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  if (!live().erase(exec)) return set_last_error(cudaErrorInvalidValue);
  delete exec;
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  if (!live().erase(graph)) return set_last_error(cudaErrorInvalidValue);
  delete graph;
  return cudaSuccess;
}
