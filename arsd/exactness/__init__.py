"""Proof that a method is lossless: enumerable models, the choice tape, and the suite that judges any rule or drafter."""
