"""One instance of every kernel, of varied shapes and types: what the syntax checks instantiate, by source file."""

INSTANCES = {
    "turboquant_attention": [
        'TQ_SPLIT("a", half, 128, 128, 3, 2, 0, 4)',
        'TQ_SPLIT("b", bfloat, 96, 192, 4, 4, 0, 1)',
        'TQ_SPLIT("c", float, 32, 256, 2, 2, 0, 2)',
        'TQ_SPLIT("d", half, 128, 128, 3, 3, 1, 4)',
        'TQ_SPLIT("e", bfloat, 256, 96, 4, 3, 1, 2)',
        'TQ_MATRIX("f", bfloat, 64, 96, 3, 2, 0)',
        'TQ_MATRIX("g", half, 256, 192, 4, 4, 0)',
        'TQ_MATRIX("h", bfloat, 96, 96, 3, 3, 1)',
        'TQ_MATRIX("i", half, 64, 128, 3, 2, 1)',
        'TQ_COMBINE("j", bfloat, 160)',
    ],
    "turboquant_prompt": [
        'TQ_PROMPT("a", half, 128, 128, 3, 2, 0, 64)',
        'TQ_PROMPT("b", bfloat, 96, 192, 4, 3, 1, 32)',
        'TQ_PROMPT("c", float, 256, 64, 2, 4, 0, 32)',
        'TQ_PROMPT("d", float, 128, 128, 3, 4, 1, 32)',
        'TQ_PROMPT("e", float, 256, 256, 4, 3, 1, 32)',
    ],
    "latent_attention": [
        'TQ_LATENT("a", half, 512, 3)',
        'TQ_LATENT("b", bfloat, 256, 4)',
        'TQ_LATENT("c", float, 512, 2)',
        'TQ_LATENT_COMBINE("d", bfloat, 512)',
    ],
    "turboquant_encode": [
        'TQ_QUANTIZE_KEYS("a", half, 96, 3)',
        'TQ_QUANTIZE_VALUES_GROUPS("b", bfloat, 128, 2)',
        'TQ_QUANTIZE_VALUES_LLOYD("c", half, 160, 3)',
        'TQ_DEQUANTIZE_LEVELS("d", bfloat, 64, 4)',
        'TQ_DEQUANTIZE_GROUPS("e", half, 224, 2)',
        'TQ_ROTATE("f", bfloat, 160)',
        'TQ_COMPACT("g", ushort)',
    ],
    "q1_matmul": [
        'TQ_Q1_MATVEC("a", half, 1, 4)',
        'TQ_Q1_MATVEC("b", bfloat, 8, 1)',
        'TQ_Q1_MATMUL("c", bfloat)',
        'TQ_TERNARY_MATVEC("f", half, 1, 4)',
        'TQ_TERNARY_MATVEC("g", bfloat, 8, 2)',
        'TQ_Q1_QUANTIZE("d", half)',
        'TQ_Q1_DEQUANTIZE("e", bfloat)',
    ],
}
