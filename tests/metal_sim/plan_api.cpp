// C entry points of metal/dispatch_plan.h for the tests: a plan as JSON, the kernel's parameter struct as bytes.
#include <cstring>
#include <sstream>

#include "dispatch_plan.h"

using namespace tqext;
using namespace tqext::metal;

namespace {

thread_local std::string text;

void write(std::ostringstream& out, const Dispatch& d) {
  out << "{\"kernel\":\"" << d.kernel() << "\",\"source\":\"" << d.source << "\",\"instance\":\"";
  for (char c : d.instance()) out << (c == '"' ? "\\\"" : std::string(1, c));
  out << "\",\"grid\":[" << d.grid[0] << "," << d.grid[1] << "," << d.grid[2] << "],\"threads\":" << d.threads
      << ",\"constants\":{";
  for (size_t i = 0; i < d.constants.size(); i++) {
    out << (i ? "," : "") << "\"" << d.constants[i].id << "\":" << d.constants[i].value;
  }
  out << "},\"threadgroup_bytes\":[";
  for (size_t i = 0; i < d.threadgroup_bytes.size(); i++) out << (i ? "," : "") << d.threadgroup_bytes[i];
  out << "]}";
}

const char* listed(const std::vector<Dispatch>& all) {
  std::ostringstream out;
  out << "[";
  for (size_t i = 0; i < all.size(); i++) {
    if (i) out << ",";
    write(out, all[i]);
  }
  out << "]";
  text = out.str();
  return text.c_str();
}

template <class Params>
const char* finish(std::ostringstream& out, const Params& params, unsigned char* bytes) {
  std::memcpy(bytes, &params, sizeof(params));
  text = out.str();
  return text.c_str();
}

}  // namespace

extern "C" {

int tq_sizeof_attention_shape() { return sizeof(AttentionShape); }
int tq_sizeof_attention_params() { return sizeof(AttentionParams); }
int tq_sizeof_encode_shape() { return sizeof(EncodeShape); }
int tq_sizeof_encode_params() { return sizeof(EncodeParams); }

int tq_has_attention_kernel(int head_dim, int value_dim, int hadamard) {
  return has_attention_kernel(head_dim, value_dim, hadamard);
}

int tq_has_listed_kernel(int n_queries) { return has_listed_kernel(n_queries); }
int tq_has_latent_kernel(int head_dim, int n_queries) { return has_latent_kernel(head_dim, n_queries); }

// Core cycles of the kernels, in the order of AttentionKernel; infinite for those that do not take the shape.
void tq_attention_cycles(const AttentionShape* shape, double* cycles) {
  const AttentionChoice choice = choose_attention(*shape);
  std::copy(choice.cycles, choice.cycles + kNumAttentionKernels, cycles);
}

// KernelFigures of a kernel at keys and values of `dims` dimensions together; and of the joining kernel.
void tq_kernel_figures(int kernel, int rows, int dims, int* figures) {
  const auto& known = AttentionKernel(kernel) == AttentionKernel::kSplit    ? kSplitFigures[rows / 2]
                      : AttentionKernel(kernel) == AttentionKernel::kMatrix ? kMatrixFigures
                                                                            : kPromptFigures[rows == 64];
  const KernelFigures f = figures_at(known, dims);
  std::memcpy(figures, &f, sizeof(f));
}
void tq_combine_figures(int* figures) {
  figures[0] = kCombineAround;
  figures[1] = kCombinePart;
}

// kernel: of AttentionKernel instead of the chosen one; -1: the chosen one.
const char* tq_plan_attention(const AttentionShape* shape, int kernel, unsigned char* params) {
  AttentionPlan plan;
  if (kernel < 0) {
    plan = plan_attention(*shape);
  } else {
    AttentionChoice choice = choose_attention(*shape);
    choice.kernel = AttentionKernel(kernel);
    plan = plan_attention(*shape, choice);
  }
  std::ostringstream out;
  out << "{\"dispatches\":[";
  for (size_t i = 0; i < plan.dispatches.size(); i++) {
    if (i) out << ",";
    write(out, plan.dispatches[i]);
  }
  out << "],\"n_parts\":" << plan.params.n_parts << ",\"n_ranges\":" << plan.params.n_ranges
      << ",\"part_numbers\":" << plan.n_part_numbers << ",\"state_numbers\":" << plan.n_state_numbers << "}";
  return finish(out, plan.params, params);
}

const char* tq_pipelines_of_a_generation(const AttentionShape* shape, int has_means) {
  return listed(pipelines_of_a_generation(*shape, has_means));
}

const char* tq_pipelines_of_a_layer(const AttentionShape* shape, int has_means, int token_type, int window) {
  return listed(pipelines_of_a_layer(*shape, has_means, Type(token_type), window));
}

const char* tq_plan_encode(int op, const EncodeShape* shape, unsigned char* params) {
  const EncodePlan plan = plan_encode(EncodeOp(op), *shape);
  std::ostringstream out;
  write(out, plan.dispatch);
  return finish(out, plan.params, params);
}

const char* tq_plan_compact(int item_bytes, int batch, int n_heads, int n_tokens, int last, const Strides4* strides,
                            unsigned char* params) {
  const EncodePlan plan = plan_compact(item_bytes, batch, n_heads, n_tokens, last, *strides);
  std::ostringstream out;
  write(out, plan.dispatch);
  return finish(out, plan.params, params);
}

const char* tq_plan_q1(int op, int type, const Q1MatmulParams* params) {
  std::ostringstream out;
  write(out, plan_q1(Q1Op(op), Type(type), *params));
  text = out.str();
  return text.c_str();
}

}  // extern "C"
