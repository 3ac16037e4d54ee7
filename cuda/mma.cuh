// The PTX the kernels need, one function per instruction, with an emulated branch. No other file
// contains inline assembly.
#pragma once
#include "cuda/gpu.cuh"

namespace graft::ptx {

#if defined(CUDA_EMU)

inline void cp_async16(void* shared, const void* global, bool valid) {
  emu::cp_async(shared, global, 16, valid ? 16 : 0);
}
inline void cp_async_commit() { emu::cp_async_commit(); }
template <int kPending>
void cp_async_wait() {
  emu::cp_async_wait(kPending);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, EMU_WHERE) {
  emu::ldmatrix(r, 4, false, row, where);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, EMU_WHERE) {
  emu::ldmatrix(r, 4, true, row, where);
}
inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                         EMU_WHERE) {
  const uint32_t b[2] = {b0, b1};
  emu::mma_m16n8k16_bf16(d, a, b, where);
}

#else

__device__ inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes to shared memory behind the thread's back; fills with zeros when not valid.
__device__ inline void cp_async16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(valid ? 16 : 0)
               : "memory");
}
__device__ inline void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's groups are unfinished.
template <int kPending>
__device__ inline void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 tiles of 16-bit elements; lane 8m+r gives the address of row r of tile m.
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// d += a(16x16, row-major) * b(16x8, column-major), bf16 in, fp32 accumulate.
__device__ inline void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif

// Two floats as the packed bf16 pair an mma operand register holds (first element in the low half).
__device__ inline uint32_t pack_bf16(float lo, float hi) {
  union {
    bf162 v;
    uint32_t u;
  } pair;
  pair.v = __floats2bfloat162_rn(lo, hi);
  return pair.u;
}

}  // namespace graft::ptx
