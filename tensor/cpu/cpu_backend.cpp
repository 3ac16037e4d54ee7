// How each kernel but the matrix product (gemm.cpp), attention (cpu_attention.cpp) and what stands
// before it (cpu_rope.cpp) is cut into pieces.
#include "tensor/cpu/cpu_backend.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "tensor/cpu/cpu_kernels.h"
#include "tensor/cpu/gemm.h"
#include "tensor/cpu/gemm_nf4.h"
#include "tensor/cpu/kernels/table.h"
#include "tensor/thread_pool.h"

namespace graft {

namespace {

constexpr int64_t kElements = 32768;  // of one piece of an elementwise kernel
constexpr int64_t kRows = 32;         // of one piece of a kernel over rows
constexpr int64_t kSumChunk = 4096;   // elements of one term of sum_of_squares

int64_t pieces_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

// A tensor as a line of elements that may be interrupted at the ends of its rows.
struct Line {
  char* data = nullptr;
  int64_t cols = 0, stride = 0, element_size = 0;

  Line() = default;
  explicit Line(const Tensor& t) {
    if (!t.defined()) return;
    data = static_cast<char*>(t.raw());
    const bool dense = t.is_contiguous();
    cols = dense ? std::max<int64_t>(t.num_elements(), 1) : t.cols();
    stride = dense ? cols : t.row_stride();
    element_size = dtype_size(t.dtype());
  }
  char* at(int64_t i) const {
    return data ? data + (i / cols * stride + i % cols) * element_size : nullptr;
  }
  int64_t run(int64_t i) const { return data ? cols - i % cols : INT64_MAX; }  // elements in a row
};

// body(n, pointers...) for every longest stretch of elements that is contiguous in all the lines.
template <class Body, class... Lines>
void for_each_run(int64_t n, const Body& body, const Lines&... lines) {
  thread_pool().run(pieces_of(n, kElements), [&](int64_t piece, int) {
    const int64_t end = std::min(n, (piece + 1) * kElements);
    for (int64_t i = piece * kElements; i < end;) {
      const int64_t length = std::min({end - i, lines.run(i)...});
      body(length, lines.at(i)...);
      i += length;
    }
  });
}

// body(first row, rows) over pieces of kRows rows.
template <class Body>
void for_each_rows(int64_t rows, const Body& body) {
  thread_pool().run(pieces_of(rows, kRows), [&](int64_t piece, int) {
    body(piece * kRows, std::min(kRows, rows - piece * kRows));
  });
}

char* row_of(const Tensor& t, int64_t row) {
  return static_cast<char*>(t.raw()) + row * t.row_stride() * dtype_size(t.dtype());
}

bool is_float(DType dtype) {
  return dtype == DType::F32 || dtype == DType::BF16 || dtype == DType::F16;
}

void check_activation(const char* op, const Tensor& t) {
  CHECK(t.dtype() == DType::F32 || t.dtype() == DType::BF16, op,
        ": the CPU kernel takes F32 or BF16, got ", dtype_name(t.dtype()));
}

// Conversions that involve F64, for tests and for reading scalars: one element at a time.
double read_double(const char* p, DType dtype) {
  switch (dtype) {
    case DType::F64: {
      double x;
      std::memcpy(&x, p, 8);
      return x;
    }
    case DType::F32: {
      float x;
      std::memcpy(&x, p, 4);
      return x;
    }
    case DType::BF16:
    case DType::F16: {
      uint16_t x;
      std::memcpy(&x, p, 2);
      return dtype == DType::BF16 ? to_float(BFloat16{x}) : to_float(Float16{x});
    }
    default:
      fail("copy: no conversion from ", dtype_name(dtype));
  }
}

void write_double(char* p, DType dtype, double x) {
  switch (dtype) {
    case DType::F64:
      std::memcpy(p, &x, 8);
      return;
    case DType::F32: {
      const float f = float(x);
      std::memcpy(p, &f, 4);
      return;
    }
    case DType::BF16:
    case DType::F16: {
      const uint16_t bits =
          dtype == DType::BF16 ? to_bfloat16(float(x)).bits : to_float16(float(x)).bits;
      std::memcpy(p, &bits, 2);
      return;
    }
    case DType::I32: {
      const int32_t i = int32_t(x);
      std::memcpy(p, &i, 4);
      return;
    }
    case DType::U8:
      *p = char(uint8_t(x));
      return;
    default:
      fail("copy: no conversion to ", dtype_name(dtype));
  }
}

}  // namespace

CpuBackend::CpuBackend() : kernels_(cpu_kernels()) {}

std::string CpuBackend::describe() const {
  return concat("cpu, ", kernels_.name, " kernels, ", thread_pool().num_threads(),
                " threads: ", cpu_choice().cpu);
}

void CpuBackend::fill(Tensor& dst, double value) {
  char pattern[8];
  write_double(pattern, dst.dtype(), value);
  const int64_t size = dtype_size(dst.dtype());
  const bool zero = std::all_of(pattern, pattern + size, [](char c) { return c == 0; });
  for_each_run(
      dst.num_elements(),
      [&](int64_t n, char* to) {
        if (zero) {
          std::memset(to, 0, size_t(n * size));
        } else {
          std::memcpy(to, pattern, size_t(size));
          for (int64_t done = size; done < n * size; done *= 2)
            std::memcpy(to + done, to, size_t(std::min(done, n * size - done)));
        }
      },
      Line(dst));
}

namespace {

// dst F32 or BF16, or through F32 whatever copy knows; NF4 again: its bytes.
void widen_nf4(Tensor& dst, const Tensor& src) {
  if (dst.dtype() == src.dtype()) {
    std::memcpy(dst.raw(), src.raw(), size_t(src.num_bytes()));
    return;
  }
  if ((dst.dtype() != DType::F32 && dst.dtype() != DType::BF16) || !dst.is_contiguous()) {
    const Tensor wide = src.to(DType::F32, Scope::Scratch);
    return cpu_backend().copy(dst, wide);
  }
  static const GemmKernels& kernels = gemm_kernels(cpu_choice().path);
  const Nf4Matrix line{nf4_view(src), src.num_elements(), dst.dtype()};
  const int64_t n = src.num_elements(), size = dtype_size(dst.dtype());
  thread_pool().run(pieces_of(n, kElements), [&](int64_t piece, int) {
    const int64_t begin = piece * kElements;
    line.widen(kernels, static_cast<char*>(dst.raw()) + begin * size, 0, 1, begin,
               std::min(kElements, n - begin));
  });
}

}  // namespace

void CpuBackend::copy(Tensor& dst, const Tensor& src) {
  CHECK(dst.num_elements() == src.num_elements(), "copy: dst is ", dst.shape(), " but src is ",
        src.shape());
  if (is_nf4(src.dtype())) return widen_nf4(dst, src);
  const DType to = dst.dtype(), from = src.dtype();
  const int64_t to_size = dtype_size(to), from_size = dtype_size(from);
  for_each_run(
      dst.num_elements(),
      [&](int64_t n, char* y, const char* x) {
        if (to == from) {
          std::memmove(y, x, size_t(n * to_size));
        } else if (is_float(to) && is_float(from)) {
          kernels_.copy(y, to, x, from, n);
        } else {
          for (int64_t i = 0; i < n; ++i)
            write_double(y + i * to_size, to, read_double(x + i * from_size, from));
        }
      },
      Line(dst), Line(src));
}

void CpuBackend::copy_scaled(std::span<const ScaledCopy> copies) {
  for (const ScaledCopy& one : copies) {
    Tensor dst = one.dst;
    if (dst.dtype() == one.src.dtype()) {
      scale(dst, one.src, one.alpha);
      continue;
    }
    Tensor scaled = Tensor::empty(one.src.shape(), one.src.dtype(), Device::CPU, Scope::Scratch);
    scale(scaled, one.src, one.alpha);
    copy(dst, scaled);
  }
}

void CpuBackend::add(Tensor& y, const Tensor& a, const Tensor& b) {
  check_activation("add", y);
  const DType dtype = y.dtype();
  for_each_run(
      y.num_elements(),
      [&](int64_t n, char* to, const char* x, const char* z) { kernels_.add(to, x, z, dtype, n); },
      Line(y), Line(a), Line(b));
}

void CpuBackend::axpy(Tensor& y, const Tensor& x, double alpha) {
  check_activation("axpy", y);
  const DType to = y.dtype(), from = x.dtype();
  for_each_run(
      y.num_elements(),
      [&](int64_t n, char* sum, const char* term) {
        kernels_.axpy(sum, to, term, from, float(alpha), n);
      },
      Line(y), Line(x));
}

void CpuBackend::scale(Tensor& y, const Tensor& x, double alpha) {
  check_activation("scale", y);
  const DType dtype = y.dtype();
  for_each_run(
      y.num_elements(),
      [&](int64_t n, char* to, const char* from) {
        kernels_.scale(to, from, dtype, float(alpha), n);
      },
      Line(y), Line(x));
}

void CpuBackend::add_sum(Tensor& total, const Tensor& x, double alpha) {
  double sum = 0;
  for (double value : x.to_doubles()) sum += value;
  total.data<double>()[0] += alpha * sum;
}

void CpuBackend::gemm(Tensor& c, std::span<const GemmTerm> terms, const Tensor& addend,
                      const Tensor& bias) {
  cpu_gemm(c, terms, addend, bias);
}

void CpuBackend::sum_rows(Tensor& db, const Tensor& dy, bool accumulate) {
  check_activation("sum_rows", dy);
  constexpr int64_t kSlab = 64;  // columns of one piece, over all rows
  const int64_t cols = dy.cols(), size = dtype_size(dy.dtype());
  thread_pool().run(pieces_of(cols, kSlab), [&](int64_t piece, int) {
    const int64_t begin = piece * kSlab;
    kernels_.sum_rows(db.data<float>() + begin, row_of(dy, 0) + begin * size, dy.dtype(),
                      dy.num_rows(), std::min(kSlab, cols - begin), dy.row_stride(), accumulate);
  });
}

void CpuBackend::embedding_forward(Tensor& y, const Tensor& ids, const Tensor& weight) {
  gather_rows(y, weight, ids);
}

void CpuBackend::embedding_backward(Tensor& dweight, const Tensor& ids, const Tensor& dy) {
  add_rows_at(dweight, dy, ids);
}

void CpuBackend::gather_rows(Tensor& dst, const Tensor& src, const Tensor& indices) {
  const int32_t* index = indices.data<int32_t>();
  const int64_t cols = dst.cols(), count = indices.num_elements();
  for (int64_t i = 0; i < count; ++i)
    CHECK(index[i] >= 0 && index[i] < src.num_rows(), "gather_rows: row ", index[i], " of ",
          src.num_rows());
  for_each_rows(count, [&](int64_t first, int64_t rows) {
    for (int64_t i = first; i < first + rows; ++i) {
      if (dst.dtype() == src.dtype()) {
        std::memcpy(row_of(dst, i), row_of(src, index[i]), size_t(cols * dtype_size(dst.dtype())));
      } else {
        kernels_.copy(row_of(dst, i), dst.dtype(), row_of(src, index[i]), src.dtype(), cols);
      }
    }
  });
}

void CpuBackend::argmax_rows(Tensor& indices, const Tensor& x) {
  CHECK(x.dtype() == DType::F32, "argmax_rows: x is ", dtype_name(x.dtype()), ", wanted F32");
  for_each_rows(x.num_rows(), [&](int64_t first, int64_t rows) {
    for (int64_t r = first; r < first + rows; ++r) {
      const float* row = x.data<float>() + r * x.row_stride();
      indices.data<int32_t>()[r] = int32_t(std::max_element(row, row + x.cols()) - row);
    }
  });
}

void CpuBackend::scatter_add_rows(Tensor& dst, const Tensor& src, const Tensor& indices) {
  add_rows_at(dst, src, indices);
}

// A piece is a slab of columns of all the rows, so two rows that meet in one place keep their
// order.
void CpuBackend::add_rows_at(Tensor& dst, const Tensor& src, const Tensor& indices) {
  constexpr int64_t kSlab = 128;
  const int32_t* index = indices.data<int32_t>();
  const int64_t cols = dst.cols(), count = indices.num_elements();
  const int64_t to_size = dtype_size(dst.dtype()), from_size = dtype_size(src.dtype());
  for (int64_t i = 0; i < count; ++i)
    CHECK(index[i] >= 0 && index[i] < dst.num_rows(), "scatter_add_rows: row ", index[i], " of ",
          dst.num_rows());
  thread_pool().run(pieces_of(cols, kSlab), [&](int64_t piece, int) {
    const int64_t begin = piece * kSlab, n = std::min(kSlab, cols - begin);
    for (int64_t i = 0; i < count; ++i)
      kernels_.axpy(row_of(dst, index[i]) + begin * to_size, dst.dtype(),
                    row_of(src, i) + begin * from_size, src.dtype(), 1.0f, n);
  });
}

Tensor CpuBackend::weight_as_f32(const Tensor& weight) {
  if (weight.dtype() == DType::F32) return weight;
  Tensor wide = Tensor::empty(weight.shape(), DType::F32, Device::CPU, Scope::Scratch);
  copy(wide, weight);
  return wide;
}

void CpuBackend::rms_norm_forward(Tensor& y, Tensor& rstd, const Tensor& x, const Tensor& weight,
                                  double eps) {
  check_activation("rms_norm", x);
  const Tensor wide = weight_as_f32(weight);
  for_each_rows(x.num_rows(), [&](int64_t first, int64_t rows) {
    kernels_.rms_norm_forward(row_of(y, first), y.row_stride(), rstd.data<float>() + first,
                              row_of(x, first), x.row_stride(), x.dtype(), wide.data<float>(), rows,
                              x.cols(), float(eps));
  });
}

void CpuBackend::rms_norm_backward(Tensor& dx, Tensor& dweight, const Tensor& dy, const Tensor& x,
                                   const Tensor& weight, const Tensor& rstd) {
  check_activation("rms_norm_backward", x);
  const Tensor wide = weight_as_f32(weight);
  const int64_t cols = x.cols(), pieces = pieces_of(x.num_rows(), kRows);
  Tensor partial;  // (pieces, cols): the sum of each piece of rows
  if (dweight.defined()) {
    partial = Tensor::empty({pieces, cols}, DType::F32, Device::CPU, Scope::Scratch);
    fill(partial, 0);
  }
  for_each_rows(x.num_rows(), [&](int64_t first, int64_t rows) {
    kernels_.rms_norm_backward(
        dx.defined() ? row_of(dx, first) : nullptr, dx.defined() ? dx.row_stride() : 0,
        partial.defined() ? partial.data<float>() + first / kRows * cols : nullptr,
        row_of(dy, first), dy.row_stride(), row_of(x, first), x.row_stride(), x.dtype(),
        wide.data<float>(), rstd.data<float>() + first, rows, cols);
  });
  if (dweight.defined()) sum_rows(dweight, partial, true);
}

void CpuBackend::swiglu_forward(Tensor& y, const Tensor& gate, const Tensor& up) {
  check_activation("swiglu", y);
  const DType dtype = y.dtype();
  for_each_run(
      y.num_elements(),
      [&](int64_t n, char* to, const char* g, const char* u) {
        kernels_.swiglu_forward(to, g, u, dtype, n);
      },
      Line(y), Line(gate), Line(up));
}

void CpuBackend::swiglu_backward(Tensor& dgate, Tensor& dup, const Tensor& dy, const Tensor& gate,
                                 const Tensor& up) {
  check_activation("swiglu_backward", dy);
  const DType dtype = dy.dtype();
  for_each_run(
      dy.num_elements(),
      [&](int64_t n, char* dg, char* du, const char* d, const char* g, const char* u) {
        kernels_.swiglu_backward(dg, du, d, g, u, dtype, n);
      },
      Line(dgate), Line(dup), Line(dy), Line(gate), Line(up));
}

void CpuBackend::cross_entropy(Tensor& losses, Tensor& logits, const Tensor& labels, double scale,
                               bool with_gradient) {
  const int64_t rows = logits.num_rows(), cols = logits.cols();
  const int32_t* label = labels.data<int32_t>();
  for (int64_t r = 0; r < rows; ++r)
    CHECK(label[r] >= 0 && label[r] < cols, "cross_entropy: label ", label[r], " of ", cols);
  const int64_t batch = std::max<int64_t>(1, kElements / std::max<int64_t>(cols, 1));
  thread_pool().run(pieces_of(rows, batch), [&](int64_t piece, int) {
    for (int64_t r = piece * batch; r < std::min(rows, (piece + 1) * batch); ++r)
      losses.data<float>()[r] =
          kernels_.cross_entropy(logits.data<float>() + r * logits.row_stride(), cols, label[r],
                                 float(scale), with_gradient);
  });
}

void CpuBackend::dropout(Tensor& y, const Tensor& x, double p, const DropoutKey& key,
                         bool accumulate) {
  CHECK(p >= 0 && p < 1, "dropout: p is ", p, ", wanted 0 <= p < 1");
  check_activation("dropout", x);
  const uint64_t threshold = uint64_t(std::ceil(p * 4294967296.0));
  for_each_rows(x.num_rows(), [&](int64_t first, int64_t rows) {
    for (int64_t r = first; r < first + rows; ++r) {
      const uint64_t row = uint64_t(key.first_row + r);
      const DropoutRow mask{{uint32_t(row), key.module, key.step},
                            {uint32_t(key.seed), uint32_t(key.seed >> 32) ^ uint32_t(row >> 32)},
                            threshold,
                            float(1 / (1 - p))};
      kernels_.dropout(row_of(y, r), row_of(x, r), x.dtype(), x.cols(), mask, accumulate);
    }
  });
}

void CpuBackend::sum_of_squares(Tensor& total, const Tensor& x) {
  CHECK(x.dtype() == DType::F32 && x.is_contiguous(), "sum_of_squares: wanted dense F32");
  const int64_t n = x.num_elements(), chunks = pieces_of(n, kSumChunk);
  constexpr int64_t kChunks = 16;  // of one piece
  Tensor sums = Tensor::empty({chunks}, DType::F64, Device::CPU, Scope::Scratch);
  thread_pool().run(pieces_of(chunks, kChunks), [&](int64_t piece, int) {
    for (int64_t c = piece * kChunks; c < std::min(chunks, (piece + 1) * kChunks); ++c)
      sums.data<double>()[c] = kernels_.sum_of_squares(x.data<float>() + c * kSumChunk,
                                                       std::min(kSumChunk, n - c * kSumChunk));
  });
  double sum = 0;
  for (int64_t c = 0; c < chunks; ++c) sum += sums.data<double>()[c];
  total.data<double>()[0] = sum;
}

void CpuBackend::clip_factor(Tensor& outcome, double max_norm) {
  reference_backend().clip_factor(outcome, max_norm);
}

void CpuBackend::adamw(Tensor& parameter, Tensor& m, Tensor& v, const Tensor& gradient,
                       const Tensor& grad_scale, const AdamWStep& step) {
  if (std::isnan(grad_scale.item())) return;
  const double correction1 = 1 - std::pow(step.beta1, double(step.step));
  const double correction2 = 1 - std::pow(step.beta2, double(step.step));
  const AdamWFactors factors{float(grad_scale.item()), float(1 - step.rate() * step.weight_decay),
                             float(step.beta2),        float(1 - step.beta1),
                             float(1 - step.beta2),    float(std::sqrt(correction2)),
                             float(step.epsilon),      float(step.rate() / correction1)};
  for_each_run(
      parameter.num_elements(),
      [&](int64_t n, char* w, char* first, char* second, const char* g) {
        kernels_.adamw(reinterpret_cast<float*>(w), reinterpret_cast<float*>(first),
                       reinterpret_cast<float*>(second), reinterpret_cast<const float*>(g), n,
                       factors);
      },
      Line(parameter), Line(m), Line(v), Line(gradient));
}

Backend& cpu_backend() {
  static CpuBackend backend;
  return backend;
}

}  // namespace graft
