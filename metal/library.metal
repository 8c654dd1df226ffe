// Source of tqext.metallib, built ahead of time where Xcode's Metal compiler is installed.
#include "turboquant_attention.metal"
#include "turboquant_encode.metal"
#include "turboquant_prompt.metal"

#define TQ_INSTANCE(name, macro, ...) macro(name, __VA_ARGS__)
#include "instances.inc"
