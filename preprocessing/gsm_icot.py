"""Converts GSM8K as iCoT publishes it (github.com/da03/Internalize_CoT_Step_by_Step) into this project's format.

A line is `question||<<step>> <<step>> #### answer`; steps hold no spaces, and a line may have none.

    python preprocessing/gsm_icot.py train.txt data/gsm_train.json
"""

import argparse
import json
import sys
from pathlib import Path


def parse_line(line: str) -> dict:
    """One example. Raises ValueError with what is wrong with the line."""
    question, bars, rest = line.partition("||")
    if not bars:
        raise ValueError("has no '||' between the question and the steps")
    if "||" in rest:
        raise ValueError("has more than one '||'")
    steps, mark, answer = rest.partition("####")
    if not mark:
        raise ValueError("has no '####' before the answer")
    answer = answer.strip()
    if not question.strip() or not answer or "#" in answer:
        raise ValueError("has an empty question, or no answer, or more than one answer")
    return {"question": question, "steps": steps.split(), "answer": answer}


def convert(path: Path) -> list[dict]:
    """All examples of a file. Raises ValueError that names the file, and the line that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}: line {line} is not UTF-8") from None
    examples = []
    # not splitlines(): a question may hold the other characters that it takes for line ends
    for number, line in enumerate(text.rstrip("\n").split("\n"), start=1):
        try:
            examples.append(parse_line(line.rstrip("\r")))
        except ValueError as error:
            raise ValueError(f"{path}: line {number} {error}") from None
    return examples


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a text file of iCoT")
    parser.add_argument("target", type=Path, help="the JSON file to write")
    options = parser.parse_args(arguments)
    try:
        examples = convert(options.source)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.target.parent.mkdir(parents=True, exist_ok=True)
    aside = options.target.with_name(options.target.name + ".part")
    aside.write_text(json.dumps(examples), encoding="utf-8")
    aside.replace(options.target)
    without = sum(not example["steps"] for example in examples)
    print(f"{options.target}: {len(examples)} examples, {without} of them without steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
