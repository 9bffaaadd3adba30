"""Scores of the LongRoPE2 paper (arXiv 2502.20082, Tables 2, 3, 4, 8, 9) and their sample counts.

The model names are those of ``conf/model``. All extended models of the paper are mid-trained, its
baselines too. Sample counts are read off the scores' steps (RULER and LOFT 100, KV retrieval 500,
En.MC 229, TREC and TriviaQA 200, code 500). Three printed means are not the means of the printed
cells and stand as printed: RULER at 4k in Table 9 (cells give 94.64), YaRN's long tasks on LLaMA3
in Table 3 (53.81), YaRN's short tasks on Phi3 in Table 4 (53.8). The LLaMA3 cells of variable
tracking and common words at 128k are illegible in the scan; 92.6 and 9.0 restore the printed mean.
"""

ORIGINAL = "original"
RULER_LENGTHS: tuple[int, ...] = (4096, 8192, 16384, 32768, 65536, 131072)
RULER_COLUMNS = (
    "niah_single_1", "niah_single_2", "niah_single_3",
    "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
)  # fmt: skip
LOFT_COLUMNS = ("arguana", "fever", "hotpotqa", "msmarco", "nq", "quora", "scifact")
LONG_COLUMNS = ("kv_retrieval", "longbook_choice_eng", "triviaqa", "trec", "lcc", "repobench-p")
SHORT_COLUMNS = ("mmlu", "mmlu_pro", "hellaswag", "truthfulqa", "gsm8k")
NUM_SAMPLES = {
    **dict.fromkeys((*RULER_COLUMNS, *LOFT_COLUMNS), 100),
    "kv_retrieval": 500, "longbook_choice_eng": 229, "triviaqa": 200, "trec": 200,
    "lcc": 500, "repobench-p": 500,
    "mmlu": 14042, "mmlu_pro": 12032, "hellaswag": 10042, "truthfulqa": 817, "gsm8k": 1319,
}  # fmt: skip
# Table 2: model -> method -> average by RULER_LENGTHS.
RULER_AVERAGES = {
    "phi3_mini": {
        "yarn": (85.74, 78.68, 75.97, 65.22, 52.16, 39.37),
        "ntk": (91.34, 87.02, 80.57, 72.81, 61.91, 49.37),
        "longrope": (88.40, 83.23, 79.46, 71.20, 64.63, 53.71),
        "longrope2": (90.41, 87.22, 83.33, 76.51, 65.37, 58.81),
    },
    "llama3_8b": {
        "yarn": (91.86, 87.87, 84.67, 68.80, 62.51, 49.39),
        "ntk": (94.38, 92.64, 91.93, 87.33, 79.26, 73.19),
        "longrope": (94.60, 92.70, 91.01, 86.60, 81.23, 73.40),
        "longrope2": (94.61, 93.68, 92.31, 90.49, 85.62, 82.03),
    },
}
# Tables 8 and 9, LongRoPE2 only: model -> length -> scores by RULER_COLUMNS, and the mean.
RULER_TASK_VALUES: dict[str, dict[int, tuple[float, ...]]] = {
    "phi3_mini": {
        4096: (100, 100, 99, 91, 96, 97, 97.75, 97.75, 85.8, 93.7, 85.33, 82, 50, 90.41),
        8192: (100, 100, 100, 90, 93, 97, 89.5, 93.75, 84, 87.2, 86, 68, 47, 87.34),
        16384: (100, 100, 99, 87, 88, 82, 91.25, 89, 85, 55.4, 91.67, 70, 45, 83.33),
        32768: (100, 100, 99, 86, 86, 57, 87, 78, 76.8, 33.2, 91.67, 56, 44, 76.51),
        65536: (100, 100, 99, 85, 71, 32, 67.75, 69.25, 66.8, 0.4, 71.67, 50, 37, 65.37),
        131072: (100, 98, 95, 92, 40, 18, 56.75, 59, 35.2, 0.3, 89.33, 47, 34, 58.81),
    },
    "llama3_8b": {
        4096: (100, 100, 99, 100, 100, 100, 99, 99.75, 98.8, 98.5, 96.33, 79, 60, 94.61),
        8192: (100, 100, 100, 100, 100, 100, 99, 99.75, 99.8, 95.9, 91.33, 74, 58, 93.68),
        16384: (100, 100, 100, 99, 100, 98, 95, 98.25, 99.6, 86.8, 96.33, 69, 58, 92.31),
        32768: (100, 100, 100, 99, 98, 100, 98, 96.25, 98.6, 63.9, 95.67, 72, 55, 90.49),
        65536: (100, 100, 100, 98, 98, 95, 95.75, 99.75, 98.6, 33.6, 80.33, 62, 52, 85.62),
        131072: (100, 100, 99, 96, 91, 94, 96.5, 97, 92.6, 9.0, 85.33, 56, 50, 82.03),
    },
}
# Table 3: model -> method -> (mean, LOFT_COLUMNS), (mean, LONG_COLUMNS).
LONG_TASK_VALUES = {
    "phi3_mini": {
        "yarn": ((5.86, 4, 4, 0, 8, 12, 1, 12), (50.96, 5.8, 31.44, 84.35, 61.00, 63.98, 59.23)),
        "ntk": ((7.57, 0, 21, 0, 6, 13, 4, 9), (52.31, 5.1, 37.55, 84.01, 65.00, 62.36, 59.82)),
        "longrope": ((21.14, 5, 64, 3, 17, 35, 8, 16),
            (50.67, 5.6, 35.81, 86.47, 62.50, 55.25, 58.43)),
        "longrope2": ((23.00, 5, 70, 4, 19, 39, 10, 14),
            (55.23, 12.0, 42.36, 87.27, 67.00, 62.67, 60.10)),
    },
    "llama3_8b": {
        "yarn": ((26.14, 7, 62, 15, 21, 43, 23, 12),
            (51.81, 2.2, 30.57, 88.97, 73.50, 65.40, 62.21)),
        "ntk": ((67.14, 22, 96, 53, 75, 89, 71, 64),
            (67.98, 66.0, 42.79, 90.87, 74.00, 68.67, 65.55)),
        "longrope": ((60.85, 22, 96, 25, 57, 90, 74, 62),
            (70.39, 74.0, 45.85, 89.99, 76.00, 69.13, 67.38)),
        "longrope2": ((74.28, 28, 96, 70, 80, 94, 79, 73),
            (73.37, 88.0, 46.72, 91.13, 76.50, 70.47, 67.39)),
    },
}  # fmt: skip
# Table 4: model -> method -> mean, SHORT_COLUMNS.
SHORT_TASK_VALUES = {
    "phi3_mini": {
        ORIGINAL: (63.2, 70.78, 41.17, 77.96, 47.82, 78.54),
        "yarn": (53.6, 63.22, 30.95, 75.27, 42.19, 57.39),
        "ntk": (57.3, 66.43, 36.09, 76.92, 43.34, 63.99),
        "longrope": (58.5, 67.26, 36.28, 75.73, 46.26, 67.17),
        "longrope2": (61.7, 70.04, 40.30, 77.07, 47.61, 73.62),
    },
    "llama3_8b": {
        ORIGINAL: (56.5, 66.62, 35.87, 82.08, 44.04, 54.05),
        "yarn": (52.1, 62.25, 31.88, 81.25, 42.61, 42.45),
        "ntk": (54.0, 63.84, 34.14, 82.11, 43.45, 46.92),
        "longrope": (54.6, 64.69, 33.74, 82.14, 43.65, 48.90),
        "longrope2": (55.7, 65.01, 34.61, 81.69, 46.17, 50.80),
    },
}
