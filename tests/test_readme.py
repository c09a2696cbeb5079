"""The README's example runs, and the files it names exist."""

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_example(tmp_path, capsys):
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[0]
    assert len(code.strip().splitlines()) <= 22
    file = tmp_path / "example.py"
    file.write_text(code)
    runpy.run_path(str(file))
    printed = capsys.readouterr().out
    assert "3: tensor([183., 203.])" in printed
    assert "torch.Size([{0: 3, 1: 3, 2: 3, 3: 1}, 2])" in printed


def test_named_files_and_targets_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"(?:docs|tests|graphs)/[\w/.]+", text):
        assert (ROOT / path.rstrip(".")).exists(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M):
        assert f"\n{target}:" in makefile, target
