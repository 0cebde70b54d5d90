"""Small data sets with the tokens that must be learned from them, and the time preparation takes.

expectations.py       a case, and what must come out of it
tokenizer_kinds.py    tokenizers that differ as real ones do
chat_formats.py       chat templates that differ as real ones do
bases.py              pairs of a tokenizer and a template

schema_cases.py       rows in every schema
message_cases.py      conversations with weights, other roles and unusual text
tool_cases.py         conversations with tools
template_cases.py     the same conversations with every template and tokenizer
refused_rows.py       rows that must be refused
observed.py           runs a case of rows and compares

written_files.py      files of every format
file_cases.py         every file format, folder and split
refused_files.py      files and settings that must be refused
prepared_files.py     runs a case of files and compares

trl_tokens.py         the tokens of the same rows by TRL
shipped_templates.py  the templates of real families that TRL ships
case_rows.py          all cases as rows of results

generated_rows.py     files of generated rows
timed_preparation.py  one preparation in a separate process
preparation_speed.py  starts them and compares
"""
