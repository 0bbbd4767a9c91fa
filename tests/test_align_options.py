"""Numbers on the command line: what is taken, and that a refusal says what is wanted and no word of ours."""

import argparse

import pytest

from align import options


@pytest.mark.parametrize("kind, good, bad", [
    (options.whole, ["0", "12"], ["-1", "1.5", "x", "nan", "inf"]), (options.two_or_more, ["2"], ["1", "0", "x"]),
    (options.not_below_zero, ["0", "1e-3"], ["-1", "nan", "inf", "x"]),
    (options.above_zero, ["1e-30", "3"], ["0", "-1", "nan", "inf", ""]),
    (options.below_one, ["0", "0.999"], ["1", "-0.1", "x"]), (options.between_zero_and_one, ["0.1"], ["0", "1", "x"])])
def test_a_number_is_taken_or_refused_in_a_sentence(kind, good, bad, capsys):
    parser = argparse.ArgumentParser()
    parser.add_argument("--number", type=kind)
    for text in good:
        assert parser.parse_args([f"--number={text}"]).number == float(text)
    for text in bad:
        with pytest.raises(SystemExit) as stopped:
            parser.parse_args([f"--number={text}"])
        told = capsys.readouterr().err
        assert stopped.value.code == 2 and "invalid" not in told
        assert any(words in told for words in ("number", "2 or more", "rate between"))
