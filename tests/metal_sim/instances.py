"""One instance of every kernel, of varied shapes and types: what the syntax checks instantiate, by source file."""

INSTANCES = {
    "turboquant_attention": [
        'TQ_SPLIT("a", half, 128, 128, 3, 2, 4)',
        'TQ_SPLIT("b", bfloat, 96, 192, 4, 4, 1)',
        'TQ_SPLIT("c", float, 32, 256, 2, 2, 2)',
        'TQ_MATRIX("d", bfloat, 64, 96, 3, 2)',
        'TQ_MATRIX("e", half, 256, 192, 4, 4)',
        'TQ_COMBINE("f", bfloat, 160)',
    ],
    "turboquant_encode": [
        'TQ_QUANTIZE_KEYS("a", half, 96, 3)',
        'TQ_QUANTIZE_VALUES("b", bfloat, 128, 2)',
        'TQ_DEQUANTIZE_KEYS("c", bfloat, 64, 4)',
        'TQ_DEQUANTIZE_VALUES("d", half, 224, 2)',
        'TQ_ROTATE("e", bfloat, 160)',
        'TQ_COMPACT("f", ushort)',
    ],
    "q1_matmul": [
        'TQ_Q1_MATVEC("a", half, 1, 4)',
        'TQ_Q1_MATVEC("b", bfloat, 8, 1)',
        'TQ_Q1_MATMUL("c", bfloat)',
        'TQ_Q1_QUANTIZE("d", half)',
        'TQ_Q1_DEQUANTIZE("e", bfloat)',
    ],
}
