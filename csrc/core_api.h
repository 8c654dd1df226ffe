// Marks what the core library gives to the extensions. The core knows no type of MLX: one build of it serves every release.
#pragma once

#define TQ_CORE __attribute__((visibility("default")))
