"""Answers with what Python writes and JSON does not know."""

print('{"score": NaN}')
