"""Scores and the files that they are measured on: on a tiny random encoder."""

import pytest
import torch
from builders import TEXTS, make_encoder_and_tokenizer

from s2sent_kernels import S2SentSelector, cache, frozen
from s2sent_kernels.packed import PackedEncoder
from s2sent_kernels.tools import evaluation, tables
from s2sent_kernels.tools.columns import Columns

stats = pytest.importorskip("scipy.stats")
POOLINGS = ["mean of last", "first-last average", "average of blocks", "cls", "s2sent", "scalar mix"]


# ---------------------------------------------------------------- scores


def test_every_pooling_is_what_its_name_says():
    encoder, tokenizer = make_encoder_and_tokenizer()
    selector = S2SentSelector(16, 3, 4, 4, block_prior=True, backend="reference").eval()
    mix = frozen.ScalarMix.of_weights([1.0, 2.0, 5.0])
    texts = [*TEXTS, TEXTS[2]]
    found = evaluation.side_by_side(encoder, tokenizer, texts, {"s2sent": selector, "scalar mix": mix}, batch_size=3)
    assert sorted(found) == sorted(POOLINGS)
    for row, text in enumerate(texts):
        batch = tokenizer([text], return_tensors="pt")
        with torch.no_grad():
            states = encoder(**batch, output_hidden_states=True).hidden_states[1:]
            means = torch.stack([state[0].mean(dim=0) for state in states])
            expected = {
                "mean of last": means[-1],
                "first-last average": (means[0] + means[-1]) / 2,
                "average of blocks": means.mean(dim=0),
                "cls": states[-1][0, 0],
                "s2sent": selector.pool(states[-3:], batch["attention_mask"])[0],
                "scalar mix": (torch.tensor([0.125, 0.25, 0.625])[:, None] * means[-3:]).sum(dim=0),
            }
        for name, values in expected.items():
            torch.testing.assert_close(found[name][row], values, rtol=1e-4, atol=1e-5, msg=f"{name}, {text}")
    with pytest.raises(TypeError, match="modules: expected selectors and scalar mixes, got Linear"):
        evaluation.side_by_side(encoder, tokenizer, texts, {"other": torch.nn.Linear(2, 2)})


def test_texts_are_encoded_packed(monkeypatch, tmp_path):
    encoder, tokenizer = make_encoder_and_tokenizer()
    calls = []
    monkeypatch.setattr(PackedEncoder, "run", recorded(PackedEncoder.run, calls))
    evaluation.side_by_side(encoder, tokenizer, TEXTS, batch_size=3)
    assert len(calls) == 1 + -(-len(TEXTS) // 3)  # with the trial
    calls.clear()
    texts = cache.make(encoder, tokenizer, TEXTS, tmp_path)
    assert len(calls) == 2 and len(texts) == len(TEXTS)


def recorded(function, calls):
    def run(*args):
        calls.append(args)
        return function(*args)

    return run


def test_correlations_are_scipys_times_100():
    similarity, gold = [0.1, 0.4, 0.35, 0.9, 0.2], [1.0, 3.0, 3.0, 5.0, 0.0]
    found = evaluation.correlations(similarity, gold)
    assert found.spearman == pytest.approx(100 * stats.spearmanr(similarity, gold).statistic)
    assert found.pearson == pytest.approx(100 * stats.pearsonr(similarity, gold).statistic)
    with pytest.raises(ValueError, match="gold: expected 5 scores"):
        evaluation.correlations(similarity, gold[:-1])


def test_sts_finds_what_it_was_made_from():
    pairs = [evaluation.Pair(f"a{i}", f"b{i}", float(i), "") for i in range(6)]
    angle = torch.linspace(1.5, 0, 6)  # the greater the score, the smaller the angle
    vectors = {f"a{i}": torch.tensor([1.0, 0.0]) for i in range(6)}
    vectors |= {f"b{i}": torch.stack([angle[i].cos(), angle[i].sin()]) for i in range(6)}
    found = evaluation.sts(lambda texts: {"known": torch.stack([vectors[text] for text in texts])}, pairs)
    assert found["known"].spearman == pytest.approx(100)


@pytest.mark.parametrize("cross_validated", [False, True])
@pytest.mark.parametrize("pair", [False, True])
def test_transfer_learns_what_is_there_and_nothing_else(cross_validated, pair):
    pytest.importorskip("sklearn")
    generator = torch.Generator().manual_seed(0)
    vectors, items = {}, []
    for i in range(120):
        noise = torch.randn(4, generator=generator)
        vectors[f"x{i}"] = torch.cat([torch.tensor([3.0 if i % 3 else -3.0]), noise])
        vectors[f"y{i}"] = torch.cat([torch.tensor([1.0]), noise])
        items.append(evaluation.Labelled((f"x{i}", f"y{i}") if pair else (f"x{i}",), str(int(i % 3 > 0))))
    splits = {"all": items} if cross_validated else {"train": items[:90], "test": items[90:]}

    def embed(texts):
        told = torch.stack([vectors[text] for text in texts])
        return {"told": told, "silent": torch.zeros_like(told)}

    found = evaluation.transfer(embed, splits)
    assert found["told"] == (100, 100)
    expected = splits["all" if cross_validated else "test"]
    share = 100 * sum(item.label == "1" for item in expected) / len(expected)
    assert found["silent"].accuracy == pytest.approx(share)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read: No such file"),
        (b"", "an empty file"),
        (
            b"split\tscore\tsentence1\n",
            "got split, score, sentence1, without sentence2: --columns sentence2=NAME says",
        ),
        (b"split\tscore\tsentence1\tsentence2\n", "expected rows below the header"),
        (b"split\tscore\tsentence1\tsentence2\ntest\t1\ta\n", "line 2: expected 4 tab-separated fields, got 3"),
        (b"split\tscore\tsentence1\tsentence2\n\ntest\tone\ta\tb\n", "line 3: expected a number as score, got 'one'"),
        (b"split\tscore\tsentence1\tsentence2\ntest\tnan\ta\tb\n", "line 2: expected a number as score, got 'nan'"),
        (b"split\tscore\tsentence1\tsentence2\ntest\tinf\ta\tb\n", "line 2: expected a number as score, got 'inf'"),
        (
            b"split\tscore\tsentence1\tsentence2\ntest\t2\ta\tb\ntest\t2.0\tc\td\n",
            "expected pairs with different scores, got 2 of score 2",
        ),
        (b"split\tscore\tsentence1\tsentence1\tsentence2\n", "expected each column once, got sentence1 twice"),
        (b"split\tscore\tsentence1\tsentence2\ntest\t1\ta\t\xff\n", r"line 2 is not UTF-8 \(byte 0xff\)"),
        (
            b"split\tscore\tsentence1\tsentence2\ntrain\t1\ta\tb\n",
            "expected rows of split 'test', got splits train",
        ),
    ],
)
def test_sts_files(content, message, tmp_path):
    path = tmp_path / "file.tsv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        evaluation.read_sts(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "split\tlabel\nall\t1\n",
            "label and either text or sentence1 and sentence2, got split, label, without",
        ),
        ("split\tlabel\ttext\ntrain\t1\ta\n", "expected rows of splits train and test, or all, got train"),
        ("split\tlabel\ttext\tsentence1\tsentence2\nall\t1\ta\tb\tc\n", "text, or sentence1 and .*, got all three"),
        ("split\tlabel\ttext\nall\t1\ta\nall\t1\tb\n", "expected at least two labels, got '1' in each row"),
    ],
)
def test_transfer_files(content, message, tmp_path):
    path = tmp_path / "file.tsv"
    path.write_text(content)
    with pytest.raises(ValueError, match=message):
        evaluation.read_transfer(path)


def test_files_without_a_column_split_are_read_whole(tmp_path):
    told = []
    columns = Columns(tell=told.append)
    pairs, labelled = tmp_path / "pairs.tsv", tmp_path / "labels.tsv"
    pairs.write_text("score\tsentence1\tsentence2\n1\ta\tb\n2\tc\td\n")
    labelled.write_text("label\ttext\n0\ta\n1\tb\n1\tc\n")
    assert [pair.score for pair in evaluation.read_sts(pairs, columns=columns)] == [1, 2]
    found = evaluation.read_transfer(labelled, columns)
    assert list(found) == ["all"] and [item.label for item in found["all"]] == ["0", "1", "1"]
    assert told == [
        f"{pairs}: no column split: all 2 pairs are scored",
        f"{labelled}: no column split: classifiers are cross-validated over all 3 rows",
    ]
    with pytest.raises(ValueError, match="expected a column split, whose 'dev' is asked for, and there is none"):
        evaluation.read_sts(pairs, "dev")


def test_a_row_without_the_split_that_others_have_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"split": "test", "label": 1, "text": "a"}\n{"label": 0, "text": "b"}\n')
    with pytest.raises(ValueError, match="line 2: expected a split, as other rows have, got none"):
        evaluation.read_transfer(path)


def test_quotes_and_byte_order_marks_are_no_trouble(tmp_path):
    path = tmp_path / "file.tsv"
    path.write_bytes('\ufeffa\tb\r\n"x\ty"z\r\n'.encode())
    assert list(tables.read_table(path, ("a", "b"))) == [(2, {"a": '"x', "b": 'y"z'})]
