#!/usr/bin/env python3
"""Writes crates/dataset/tests/fixtures: the same rows as JSONL and as Parquet, in the ways that other
programs write Parquet. Needs pyarrow (made with 26.0.1).

    pip install pyarrow && scripts/make_data_fixtures.py
"""

import datetime
import decimal
import json
import pathlib

import pyarrow as pa
import pyarrow.parquet as pq

OUT = pathlib.Path(__file__).parent.parent / "crates/dataset/tests/fixtures"

PLAIN = [
    {"prompt": 'Say "Hi", twice', "completion": "Hi,\nHi"},
    {"prompt": "Träume 🦀\tund mehr", "completion": "; , \\ '"},
    # Long enough that packing makes it shorter: short pages are left as they are.
    {"prompt": "third", "completion": "again and " * 100 + "the end"},
]

TOOL = {"type": "function", "function": {"name": "look", "description": "Looks", "parameters": {"type": "object"}}}
CHATS = [
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, you", "weight": 1}]},
    {"messages": [
        {"role": "system", "content": "Be \"kind\"\n"},
        {"role": "user", "content": "1"},
        {"role": "assistant", "content": "2", "weight": 0},
        {"role": "user", "content": "3"},
        {"role": "assistant", "content": "4"},
    ]},
    {"messages": [{"role": "user", "content": "🦀"}, {"role": "assistant", "content": "a crab"}]},
]


def lines(name, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (OUT / name).write_text(text, encoding="utf-8")


def main():
    OUT.mkdir(exist_ok=True)
    lines("plain.jsonl", PLAIN)
    lines("chats.jsonl", CHATS)
    plain = pa.Table.from_pylist(PLAIN)
    # As pandas and the datasets library write it: dictionary pages, snappy.
    pq.write_table(plain, OUT / "plain.parquet")
    for packing in ["none", "gzip", "zstd", "brotli", "lz4"]:
        pq.write_table(
            plain,
            OUT / f"plain-{packing}.parquet",
            compression=packing,
            use_dictionary=False,
            data_page_version="2.0",
            row_group_size=2,
        )
    # Text that is not marked as text, as old versions of Spark and Impala leave it; large strings, as
    # polars has them.
    pq.write_table(plain.cast(pa.schema([("prompt", pa.binary()), ("completion", pa.large_string())])),
                   OUT / "plain-binary.parquet")
    # Lists of structs, in which keys that a message lacks are null.
    chats = pa.Table.from_pylist(CHATS, schema=pa.schema([("messages", pa.list_(pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("weight", pa.int64())])))]))
    pq.write_table(chats, OUT / "chats.parquet")
    typed = pa.table({
        "prompt": pa.array([2**63 - 1, -1, None], pa.int64()),
        "completion": pa.array([1.5, float("nan"), float("inf")], pa.float64()),
        "day": pa.array([datetime.date(2026, 11, 27)] * 3, pa.date32()),
        "amount": pa.array([decimal.Decimal("1234567890123456789.25")] * 3, pa.decimal128(30, 2)),
        "moment": pa.array([datetime.datetime(2026, 11, 27, 10, 30)] * 3, pa.timestamp("ms")),
        "large": pa.array([2**64 - 1, 0, 1], pa.uint64()),
        "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
        "__index_level_0__": pa.array([0, 1, 2]),
    })
    pq.write_table(typed, OUT / "typed.parquet")
    # 64 MiB of one letter, in a page that takes 3 KiB.
    pq.write_table(pa.table({"text": ["a" * (64 << 20)]}), OUT / "bomb.parquet", compression="zstd",
                   use_dictionary=False, write_statistics=False)


if __name__ == "__main__":
    main()
