"""Base models made from nothing on a laptop CPU, for the quickstart and the tests.

One row per model: name -> (module, function, config class). Rows are strings, resolved when asked for, because the
modules import torch and model libraries and the command line must not.
"""

PRETRAINERS: dict[str, tuple[str, str, str]] = {
    "glyphs": ("raylign.pretrain.glyphs", "pretrain", "GlyphsConfig"),
    "shapes": ("raylign.pretrain.shapes", "pretrain", "ShapesConfig"),
    "text-tiny": ("raylign.pretrain.text_tiny", "pretrain", "TextPretrainConfig"),
    "text-countdown": ("raylign.pretrain.text_tiny", "pretrain", "CountdownPretrainConfig"),
    "text-sudoku": ("raylign.pretrain.text_tiny", "pretrain", "SudokuPretrainConfig"),
    "text-addition": ("raylign.pretrain.text_tiny", "pretrain", "AdditionPretrainConfig"),
}
