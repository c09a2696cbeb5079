"""A unittest base class with golden graphs."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import expecttest

from .files import assert_expected_inline, assert_golden


class GoldenTestCase(expecttest.TestCase):
    """expecttest's TestCase whose failures say what changed on which ranks.

    Attributes:
        golden_folder: where golden files are; by default `graphs` beside the folder of the test.
    """

    golden_folder: Path | str | None = None

    def assertGolden(self, graphs: Any, name: str | None = None) -> None:
        """Compare graphs with a golden file, FOLDER/TEST_FILE/TEST.txt or the one of that name.

        Raises:
            GoldenMismatch: other graphs; EXPECTTEST_ACCEPT=1 accepts them.
            GoldenError: a file that is no golden text.
        """
        file = Path(inspect.getfile(type(self)))
        folder = Path(self.golden_folder or file.parent.parent / "graphs")
        test = self._testMethodName.removeprefix("test_")
        assert_golden(graphs, folder / file.stem.removeprefix("test_") / f"{name or test}.txt")

    def assertExpectedInline(self, actual: Any, expect: str, skip: int = 0) -> None:
        """Compare graphs, or other text, with a string literal in the test."""
        if isinstance(actual, str):
            super().assertExpectedInline(actual, expect, skip=skip + 1)
        else:
            assert_expected_inline(actual, expect, skip=skip + 1)
