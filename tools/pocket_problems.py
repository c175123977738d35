"""Make small Python problems: what the pocket pair is trained on, and PocketEval is cut from.

Everything is text with two kinds of holes. `$name` is a name or, in capitals, a constant; `«a|b|c»` is
a choice. In English all choices mean the same. In code the first choice is right and every other one is
a slip people make, so a buggy program is a right one with a single hole filled wrongly (or, by an author
with a habit, with all holes of one kind). Blocks of the tables below compose: a source of items, a filter,
a map, a consumer and a test of its result; or a whole program and a test of its result; or a condition that
decides between two maps.

    python tools/pocket_problems.py --seed 0 --show 20
"""

import argparse
import ast
import builtins
import collections
import itertools
import json
import keyword
import math
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

# ruff: noqa: E501  (a block is one row of a table, however long)

MAX_WORDS = 22
_TAKEN = {*dir(builtins), "math"}


class Block(NamedTuple):
    """One row of a table. Types are i int, s word, c character, l list, d dict, b bool."""

    key: str  # names the block in combinations, and its words the functions made of it
    kind: str  # "i": takes ints; "i>s": ints to words
    text: str  # English; @ is the noun, # the phrase it applies to, (s) a plural
    code: tuple[str, ...]  # the styles it can be written in; the last line, "= x", is the result
    more: str = ""  # a second English form, see each table
    args: str = ""  # names from ARGS


def _rows(*rows: tuple) -> list[Block]:
    return [Block(r[0], r[1], r[2], (r[3],) if isinstance(r[3], str) else r[3], *r[4:]) for r in rows]


# Filters. `text` is the noun with its attribute, `more` the verb phrase of one item (default: is ...).
FILTERS = _rows(
    ("even", "i", "even @", "$x % 2 == «0|1»"),
    ("odd", "i", "odd @", "$x % 2 == «1|0»"),
    ("positive", "i", "positive @", "$x «>|>=|<» 0"),
    ("negative", "i", "negative @", "$x «<|<=|>» 0"),
    ("nonzero", "i", "non-zero @", "$x «!=|==|>» 0"),
    ("above", "i", "@ «greater than|above|larger than» $T", "$x «>|>=|<» $T"),
    ("below", "i", "@ «less than|below|smaller than» $T", "$x «<|<=|>» $T"),
    ("at_least", "i", "@ «of at least|not less than» $T", "$x «>=|>|<=» $T", "is «at least|not less than» $T"),
    ("at_most", "i", "@ «of at most|not greater than» $T", "$x «<=|<|>=» $T", "is «at most|not greater than» $T"),
    ("multiple", "i", "@ «divisible by|that are multiples of» $K", "$x % $K «==|!=» 0", "is «divisible by|a multiple of» $K"),
    ("not_multiple", "i", "@ not divisible by $K", "$x % $K «!=|==» 0"),
    ("between", "i", "@ «from $K to $U|between $K and $U inclusive»", "$K «<=|<» $x «<=|<» $U"),
    ("outside", "i", "@ «less than|below» $K or «greater than|above» $U", "$x «<|<=» $K «or|and» $x «>|>=» $U"),
    ("two_digit", "i", "two-digit @", "10 «<=|<» abs($x) «<=|<» «99|100|9»", "has two digits"),
    ("ending", "i", "@ «ending in|with last digit» $K", "«abs($x)|$x» % 10 «==|!=» $K", "«ends in|has last digit» $K"),
    ("prime", "i", "prime @", "$x > «1|0|2» and all($x % p «!=|==» 0 for p in range(«2|1», $x))"),
    ("not_equal", "i", "@ different from $T", "$x «!=|==» $T"),
    ("longer", "s", "@ longer than $K «letters|characters»", "len($x) «>|>=|<» $K"),
    ("shorter", "s", "@ shorter than $U «letters|characters»", "len($x) «<|<=|>» $U"),
    ("length", "s", "@ «of exactly|with exactly» $K letters", "len($x) «==|!=|>=» $K", "has exactly $K letters"),
    ("starts", "s", "@ «starting with|that start with» $C", "$x.«startswith|endswith»($C)", "starts with $C"),
    ("ends", "s", "@ «ending with|that end with» $C", "$x.«endswith|startswith»($C)", "ends with $C"),
    ("contains", "s", "@ «containing|that contain» $C", "$C «in|not in» $x", "contains $C"),
    ("lacks", "s", "@ «without|that do not contain» $C", "$C «not in|in» $x", "does not contain $C"),
    ("vowel_start", "s", "@ «starting with|that start with» a vowel", "$x[«0|-1»] «in|not in» \"aeiou\"", "starts with a vowel"),
    ("palindrome", "s", "«palindromic @|@ that are palindromes»", "$x «==|!=» $x[::-1]", "is a palindrome"),
    ("all_different", "s", "@ «with no repeated letter|without repeated letters»", "len(set($x)) «==|!=|>» len($x)", "has no repeated letter"),
    ("same_ends", "s", "@ that start and end with the same letter", "$x[0] «==|!=» $x[«-1|1|-2»]", "starts and ends with the same letter"),
    ("before", "s", "@ that come before $W in the alphabet", "$x «<|>» $W", "comes before $W in the alphabet"),
    ("vowel", "c", "@ that are vowels", "$x.lower() «in|not in» \"aeiou\"", "is a vowel"),
    ("consonant", "c", "@ that are consonants", "$x.isalpha() «and|or» $x.lower() «not in|in» \"aeiou\"", "is a consonant"),
    ("digit", "c", "@ that are digits", "$x.«isdigit|isalpha|isalnum»()", "is a digit"),
    ("letter", "c", "@ that are letters", "$x.«isalpha|isalnum|isdigit»()", "is a letter"),
    ("upper", "c", "upper-case @", "$x.«isupper|islower|isalpha»()"),
    ("lower", "c", "lower-case @", "$x.«islower|isupper|isalpha»()"),
    ("except", "c", "@ other than $C", "$x «!=|==» $C", "is not $C"),
    ("after", "c", "@ greater than $C", "$x «>|>=|<» $C"),
    ("one_of", "c", "@ that occur in $W", "$x «in|not in» $W", "occurs in $W"),
    ("blank", "c", "@ that are not spaces", "$x «!=|==» \" \"", "is not a space"),
)

# Maps. `text` is the noun phrase ("X of #" gives an attribute, X), `more` what is done to each item.
MAPS = _rows(
    ("square", "i>i", "square(s) of #", "$x ** «2|3»", "square each"),
    ("cube", "i>i", "cube(s) of #", "$x ** «3|2»", "cube each"),
    ("abs", "i>i", "absolute value(s) of #", "abs($x)", "take the absolute value of each"),
    ("double", "i>i", "double(s) of #", "$x «* 2|+ 2|** 2»", "double each"),
    ("negate", "i>i", "negation(s) of #", "-$x", "negate each"),
    ("plus", "i>i", "# plus $K", "$x «+|-|*» $K", "«add $K to each|increase each by $K»"),
    ("minus", "i>i", "# minus $K", "$x «-|+» $K", "«subtract $K from each|decrease each by $K»"),
    ("times", "i>i", "# times $K", "$x «*|+|**» $K", "multiply each by $K"),
    ("halve", "i>i", "# divided by 2, rounded down", "$x «//|/|%» 2", "halve each, rounding down"),
    ("modulo", "i>i", "# modulo $K", "$x «%|//» $K", "take each modulo $K"),
    ("cap", "i>i", "# capped at $T", "«min|max»($x, $T)", "cap each at $T"),
    ("digit_sum", "i>i", "digit sum(s) of #", "sum(int(ch) for ch in str(«abs($x)|$x»)«|[1:]»)", "take the digit sum of each"),
    ("digits", "i>i", "digit count(s) of #", "len(str(«abs($x)|$x»))«| - 1»", "count the digits of each"),
    ("last_digit", "i>i", "last digit(s) of #", "«abs($x)|$x» «%|//» 10", "take the last digit of each"),
    ("first_digit", "i>i", "first digit(s) of #", "int(str(«abs($x)|$x»)[«0|-1»])", "take the first digit of each"),
    ("reverse_digits", "i>i", "digit reversal(s) of #", "int(str(«abs($x)|$x»)[::-1])", "reverse the digits of each, dropping any sign"),
    ("ones", "i>i", "binary one count(s) of #", "bin($x).count(\"«1|0»\")", "count the ones in the binary form of each"),
    ("text", "i>s", "decimal string(s) of #", "str($x)", "turn each into a string"),
    ("binary", "i>s", "binary string(s) of #", "format($x, \"«b|o|d»\")", "write each in binary"),
    ("hex", "i>s", "hexadecimal string(s) of #", "format($x, \"«x|b|X»\")", "write each in lower-case hexadecimal"),
    ("length", "s>i", "length(s) of #", "len($x)«| - 1|»", "take the length of each"),
    ("vowels", "s>i", "vowel count(s) of #", "sum(ch «in|not in» \"aeiou\" for ch in $x)", "count the vowels of each"),
    ("letters", "s>i", "distinct letter count(s) of #", "len(«set($x)|$x»)", "count the distinct letters of each"),
    ("count_letter", "s>i", "$C count(s) of #", "$x.count($C)«| + 1|»", "count the letter $C in each"),
    ("upper", "s>s", "upper-case form(s) of #", "$x.«upper|lower|title»()", "«upper-case each|convert each to upper case»"),
    ("capitalize", "s>s", "capitalized form(s) of #", "$x.«capitalize|upper|lower»()", "capitalize each"),
    ("reverse", "s>s", "reversal(s) of #", "$x[::«-1|1|-2»]", "reverse each"),
    ("first_letter", "s>s", "first letter(s) of #", "$x[«0|-1|1»]", "take the first letter of each"),
    ("last_letter", "s>s", "last letter(s) of #", "$x[«-1|0|-2»]", "take the last letter of each"),
    ("prefix", "s>s", "first $K letters of #", "$x[:«$K|$K1|-$K»]", "«keep|take» the first $K letters of each"),
    ("suffix", "s>s", "last $K letters of #", "$x[«-$K:|$K:|:-$K»]", "«keep|take» the last $K letters of each"),
    ("drop_first", "s>s", "# without the first letter", "$x[«1:|:-1|2:»]", "drop the first letter of each"),
    ("repeat", "s>s", "# repeated $K times", "$x * «$K|$K1»", "repeat each $K times"),
    ("suffixed", "s>s", "# followed by $Z", "«$x + $Z|$Z + $x»", "append $Z to each"),
    ("swap", "s>s", "# with $C replaced by $V", "$x.replace(«$C, $V|$V, $C»)", "replace $C by $V in each"),
    ("remove", "s>s", "# without the letter $C", "$x.replace($C, «\"\"|\" \"»)", "remove $C from each"),
    ("sort_letters", "s>s", "sorted letters of #", "\"«| »\".join(sorted($x))", "sort the letters of each"),
    ("no_vowels", "s>s", "vowel-free form(s) of #", "\"\".join(ch for ch in $x if ch «not in|in» \"aeiou\")", "remove the vowels from each"),
    ("upper", "c>c", "upper-case form(s) of #", "$x.«upper|lower»()", "«upper-case each|convert each to upper case»"),
    ("lower", "c>c", "lower-case form(s) of #", "$x.«lower|upper»()", "«lower-case each|convert each to lower case»"),
    ("swap_case", "c>c", "# with swapped case", "$x.«swapcase|upper|lower»()", "swap the case of each"),
    ("repeat", "c>c", "# repeated $K times", "$x * «$K|$K1»", "repeat each $K times"),
    ("code", "c>i", "character code(s) of #", "ord($x)«| - 1»", "take the character code (ord) of each"),
    ("next", "c>c", "next character(s) of #", "chr(ord($x) «+|-» 1)", "replace each by the next character code"),
    ("marked", "c>c", "# followed by $Z", "«$x + $Z|$Z + $x»", "append $Z to each"),
)

# Maps of whole lists and dicts.
COLLECTION_MAPS = _rows(
    ("sum", "l>i", "sum(s) of #", "«sum|len»($x)"),
    ("max", "l>i", "maximum(s) of #", "«max|min»($x)"),
    ("spread", "l>i", "spread(s) (largest minus smallest) of #", "max($x) «-|+» min($x)"),
    ("distinct", "l>i", "distinct value count(s) of #", "len(«set($x)|$x»)"),
    ("size", "d>i", "number of keys of #", "len($x)«| - 1»"),
    ("keys", "d>l", "list of the keys of #", "list($x«|.values()»)"),
    ("values", "d>l", "list of the values of #", "list($x«.values()|»)"),
    ("reversed", "l>l", "reverse of #", "$x[::«-1|1»]"),
    ("size", "l>i", "length(s) of #", "len($x)«| - 1|»"),
    ("tail", "l>l", "# without its first element", "$x[«1:|:-1»]"),
    ("head", "l>l", "first $K elements of #", "$x[:«$K|$K1»]"),
    ("twice", "l>l", "# repeated twice", "$x * «2|3»"),
    ("sorted", "l>l", "# sorted in ascending order", "sorted($x«|, reverse=True»)"),
)

# Sources. `text` is the noun, `more` the place; the last code line is "target in iterable [=> item]".
SOURCES = _rows(
    ("numbers", "i", "number(s)", ("$x in $xs",), "«in $xs|in $xs|in the list|in the list $xs»", "xs"),
    ("range", "i", "number(s)", ("$x in range(«1|0», «$n + 1|$n»)",), "from 1 to $n", "n"),
    ("range", "i", "number(s)", ("$x in range(«$n|$n + 1»)",), "from 0 up to but not including $n", "n"),
    ("range", "i", "number(s)", ("$x in range($n, «0|-1», -1)",), "counting down from $n to 1", "n"),
    ("range", "i", "number(s)", ("$x in range($lo, «$hi + 1|$hi»)",), "from $lo to $hi inclusive", "lo hi"),
    ("range", "i", "multiple(s) of $K", ("$x in range($K, «$n + 1|$n», $K)",), "from $K up to $n", "n"),
    ("digits", "i", "digit(s)", ("$x in map(int, str($big))", "$ch in str($big) => int($ch)"), "of $big", "big"),
    ("divisors", "i", "divisor(s)", ("$x in [q for q in range(«1|2», «$p + 1|$p») if $p % q == 0]",), "of $p", "p"),
    ("values", "i", "value(s)", ("$x in $d.values()", "$key in $d => $d[$key]"), "«in the dict $d|of $d»", "d"),
    ("keys", "s", "key(s)", ("$x in $d",), "«in the dict $d|of $d»", "d"),
    ("keys", "s", "key(s) with value above $T", ("$x in [k for k, v in $d.items() if v «>|>=|<» $T]",), "in the dict $d", "d"),
    ("pairs", "i", "pairwise sum(s)", ("$a, $b in zip($xs, $ys) => $a «+|*|-» $b",), "of $xs and $ys", "xs ys"),
    ("pairs", "i", "pairwise product(s)", ("$a, $b in zip($xs, $ys) => $a «*|+» $b",), "of $xs and $ys", "xs ys"),
    ("pairs", "i", "pairwise absolute difference(s)", ("$a, $b in zip($xs, $ys) => «abs($a - $b)|$a - $b»",), "of $xs and $ys", "xs ys"),
    ("pairs", "i", "pairwise maximum(s)", ("$a, $b in zip($xs, $ys) => «max|min»($a, $b)",), "of $xs and $ys", "xs ys"),
    ("pairs", "i", "number(s)", ("$x in «$xs + $ys|$xs»",), "in $xs followed by $ys", "xs ys"),
    ("shared", "i", "number(s)", ("$x in [v for v in $xs if v «in|not in» $ys]",), "of $xs that also occur in $ys", "xs ys"),
    ("shared", "i", "number(s)", ("$x in [v for v in $xs if v «not in|in» $ys]",), "of $xs that do not occur in $ys", "xs ys"),
    ("steps", "i", "step(s)", ("$a, $b in zip($xs, $xs[1:]) => «$b - $a|$a - $b»", "$i in range(«1|0», len($xs)) => $xs[$i] - $xs[$i - 1]"), "from each number in $xs to the next", "xs"),
    ("steps", "i", "sum(s)", ("$a, $b in zip($xs, $xs[1:]) => $a «+|-|*» $b", "$i in range(len($xs) - 1) => $xs[$i] + $xs[$i + 1]"), "of neighbouring numbers in $xs", "xs"),
    ("windows", "i", "sum(s)", ("$i in range(len($xs) - «$K + 1|$K») => sum($xs[$i:$i + $K])",), "of $K consecutive numbers in $xs", "xs"),
    ("running", "i", "running total(s)", ("$sums = []\n$run = 0\nfor num in $xs:\n    $run += num\n    $sums.append($run)\n$x in $sums", "$i in range(len($xs)) => sum($xs[:«$i + 1|$i»])"), "of $xs", "xs"),
    ("slices", "i", "number(s)", ("$x in $xs[«::2|1::2|:2»]",), "at even indices of $xs", "xs"),
    ("slices", "i", "number(s)", ("$x in $xs[«1::2|::2|1:2»]",), "at odd indices of $xs", "xs"),
    ("slices", "i", "number(s)", ("$x in $xs[:«$K|$K1|-$K»]",), "among the first $K of $xs", "xs"),
    ("slices", "i", "number(s)", ("$x in $xs[«-$K:|$K:|:-$K»]",), "among the last $K of $xs", "xs"),
    ("slices", "i", "number(s)", ("$x in $xs[«1:|2:|:-1»]",), "after the first one in $xs", "xs"),
    ("grid", "i", "number(s)", ("$x in [v for row in $grid for v in row]",), "in «the rows of $grid|the nested list $grid»", "grid"),
    ("grid", "i", "row sum(s)", ("$row in $grid => sum($row)",), "of $grid", "grid"),
    ("grid", "i", "largest number(s) of the rows", ("$row in $grid => «max|min»($row)",), "of $grid", "grid"),
    ("grid", "i", "column sum(s)", ("$col in zip(*$grid) => sum($col)",), "of $grid", "grid"),
    ("grid", "i", "first number(s) of the rows", ("$row in $grid => $row[«0|-1|1»]",), "of $grid", "grid"),
    ("words", "s", "«word(s)|string(s)»", ("$x in $ws",), "«in $ws|in $ws|in the list|in the list $ws»", "ws"),
    ("words", "s", "word(s)", ("$x in «$ws + $vs|$ws»",), "in $ws followed by $vs", "ws vs"),
    ("words", "s", "word(s)", ("$x in $ws[«::2|1::2»]",), "at even indices of $ws", "ws"),
    ("words", "s", "word(s)", ("$x in [v for v in $ws if v «not in|in» $vs]",), "of $ws that do not occur in $vs", "ws vs"),
    ("words", "s", "concatenation(s)", ("$a, $b in zip($ws, $vs) => «$a + $b|$b + $a»",), "of the words at equal positions in $ws and $vs", "ws vs"),
    ("sentence", "s", "word(s)", ("$x in $s.split()",), "«in the sentence $s|in $s|of the sentence»", "s"),
    ("sentence", "s", "word(s)", ("$x in $s.split()[«1:|:-1»]",), "after the first one in the sentence $s", "s"),
    ("sentence", "s", "word(s)", ("$x in $s.split()[::«-1|1»]",), "of the sentence $s, taken from last to first,", "s"),
    ("sentence", "s", "part(s)", ("$x in $csv.split(\"«,| »\")",), "of $csv between commas", "csv"),
    ("prefixes", "s", "prefix(es)", ("$i in range(len($w)) => $w[:«$i + 1|$i»]", "$x in [$w[:q] for q in range(1, «len($w) + 1|len($w)»)]"), "of $w, shortest first,", "w"),
    ("characters", "c", "character(s)", ("$x in $m",), "«in $m|in the string|of the string $m»", "m"),
    ("characters", "c", "character(s)", ("$x in $m[«::2|1::2»]",), "at even indices of $m", "m"),
    ("characters", "c", "character(s)", ("$x in $m[«::-1|::1»]",), "of $m, from last to first,", "m"),
    ("characters", "c", "character(s)", ("$x in $m[:«len($m) // 2|2»]",), "in the first half (rounded down) of $m", "m"),
    ("characters", "c", "character(s)", ("$x in [ch for ch in $m if ch «in|not in» $m2]",), "of $m that occur in $m2", "m m2"),
)

# Consumers. `text` is what to return ($all items, mapped; $items unmapped; $one, $every, $attr, $is), `more`
# the end of an imperative sentence. Kind: item types > type of the result, then what is needed:
# f filter, m map, n no map, x filter or map. $loop runs over the filtered items, $v is the mapped item.
CONSUMERS = _rows(
    ("sum", "i>i", "the «sum|sum|total» of $all", ("= sum($gen)", "$acc = «0|1»\n$loop\n    $acc «+=|-=|=» $v\n= $acc"), "«their sum|the sum|the total»"),
    ("product", "i>i", "the product of $all (1 if there are none)", ("$acc = «1|0»\n$loop\n    $acc «*=|+=|=» $v\n= $acc", "= math.prod($gen)"), "their product (1 if there are none)"),
    ("max", "i>?", "the «largest|maximum» of $all, or None if there are none", ("= «max|min»(($gen), default=None)", "$best = None\n$loop\n    if $best is None or $v «>|<» $best:\n        $best = $v\n= $best"), "the «largest|maximum», or None if there are none"),
    ("min", "i>?", "the «smallest|minimum» of $all, or None if there are none", ("= «min|max»(($gen), default=None)", "$best = None\n$loop\n    if $best is None or $v «<|>» $best:\n        $best = $v\n= $best"), "the «smallest|minimum», or None if there are none"),
    ("spread", "i>i", "the largest minus the smallest of $all (0 if there are none)", ("$vals = [$gen]\n= «max($vals) - min($vals)|min($vals) - max($vals)|max($vals)» if $vals else 0", "$vals = sorted($gen)\n= $vals[-1] - $vals[«0|1»] if $vals else 0"), "the largest minus the smallest (0 if there are none)"),
    ("average", "i>?", "the «average|mean» of $all (0 if there are none)", ("$vals = [$gen]\nif not $vals:\n    return «0|None»\n= sum($vals) «/|//» len($vals)", "$vals = [$gen]\n= sum($vals) «/|//» «len($vals)|2» if $vals else 0"), "their «average|mean» (0 if there are none)"),
    ("count", "isc>i fn", "the number of $items", ("= sum(1 for $x in $src if «$pred|not $pred»)", "$acc = «0|1»\n$loop\n    $acc «+= 1|= 1|+= 2»\n= $acc", "= len([$gen])«| - 1»"), "«how many there are|their number»"),
    ("distinct", "isc>i", "the number of «distinct|different» values among $all", ("= len(«set($gen)|[$gen]»)", "$out = []\n$loop\n    if $v «not in|in» $out:\n        $out.append($v)\n= len($out)"), "how many «distinct|different» values there are"),
    ("list", "isc>l x", "«a|the» list of $all", ("= [$gen]", "$out = []\n$loop\n    $out.append(«$v|$x»)\n= $out"), "«the results|them» as a list"),
    ("sorted", "isc>l", "the sorted list of $all", ("= sorted($gen)", "$out = [$gen]\n«$out.sort()|$out.reverse()|»\n= $out"), "them as a sorted list"),
    ("descending", "isc>l", "a list of $all in descending order", ("= sorted(($gen)«, reverse=True|»)", "$out = sorted($gen)\n= $out[::«-1|1»]"), "them as a list in descending order"),
    ("unique", "isc>l", "a list of $all without duplicates, in order of first appearance", ("$out = []\n$loop\n    if $v «not in|in» $out:\n        $out.append($v)\n= $out", "= list(«dict.fromkeys($gen)|[$gen]»)"), "them as a list without duplicates, keeping the first of each"),
    ("first", "isc>?", "the first of $all, or None if there are none", ("= next(($gen), None)", "$loop\n    return $v\n= None", "$vals = [$gen]\n= $vals[«0|-1|1»] if $vals else None"), "the first, or None if there are none"),
    ("last", "isc>?", "the last of $all, or None if there are none", ("$vals = [$gen]\n= $vals[«-1|0|-2»] if $vals else None", "$best = None\n$loop\n    $best = $v\n= $best"), "the last, or None if there are none"),
    ("top", "i>l", "a list of the $K largest of $all, largest first", ("= sorted(($gen)«, reverse=True|»)[:«$K|$K1»]", "$vals = sorted($gen)\n= $vals[::-1][:«$K|$K1»]"), "a list of the $K largest, largest first"),
    ("leading", "isc>l", "a list of the first $K of $all", ("= [$gen][:«$K|$K1|-$K»]", "$out = []\n$loop\n    if len($out) «<|<=|>» $K:\n        $out.append($v)\n= $out"), "the first $K of them as a list"),
    ("join", "i>s", "a string of $all joined by $Z", ("= «$Z|\"\"».join(map(str, [$gen]))", "$out = []\n$loop\n    $out.append(str($v))\n= «$Z|\"\"».join($out)"), "them joined into one string by $Z"),
    ("join", "sc>s", "a string of $all joined by $Z", ("= «$Z|\"\"».join($gen)", "$out = []\n$loop\n    $out.append($v)\n= «$Z|\"\"».join($out)"), "them joined into one string by $Z"),
    ("concat", "c>s x", "the string made of $all", ("= \"«| »\".join($gen)", "$out = \"\"\n$loop\n    $out «+=|=» $v\n= $out"), "the resulting string"),
    ("longest", "s>s", "the longest of $all, the first one on ties, or '' if there are none", ("= «max|min»(($gen), key=len, default=\"\")", "$best = \"\"\n$loop\n    if len($v) «>|>=|<» len($best):\n        $best = $v\n= $best"), "the longest (the first one on ties, '' if there are none)"),
    ("shortest", "s>?", "the shortest of $all, the first one on ties, or None if there are none", ("= «min|max»(($gen), key=len, default=None)", "$best = None\n$loop\n    if $best is None or len($v) «<|<=|>» len($best):\n        $best = $v\n= $best"), "the shortest (the first one on ties, None if there are none)"),
    ("total_length", "s>i", "the total length of $all", ("$acc = «0|1»\n$loop\n    $acc «+=|=|-=» len($v)\n= $acc", "= len(\"«| »\".join($gen))"), "their total length"),
    ("alphabetical", "s>?", "the alphabetically «first|smallest» of $all, or None if there are none", ("= «min|max»(($gen), default=None)", "$vals = sorted($gen)\n= $vals[«0|-1|1»] if $vals else None"), "the alphabetically first, or None if there are none"),
    ("common", "isc>?", "the most common of $all, the first one on ties, or None if there are none", ("$vals = [$gen]\n= «max|min»($vals, key=$vals.count, default=None)", "$vals = [$gen]\n$best = None\nfor q in $vals:\n    if $best is None or $vals.count(q) «>|>=|<» $vals.count($best):\n        $best = q\n= $best"), "the most common one (the first on ties, None if there are none)"),
    ("count_each", "isc>d", "a dict «with|of» how often each of $all occurs", ("$counts = {}\n$loop\n    $counts[$v] = $counts.get($v, «0|1») + «1|2»\n= $counts", "$vals = [$gen]\n= {q: $vals.count(q)«| + 1» for q in $vals}"), "a dict of how often each one occurs"),
    ("repeated", "isc>l", "a list of the values that occur more than once among $all, without duplicates", ("$vals = [$gen]\n= [q for q in dict.fromkeys($vals) if $vals.count(q) «> 1|== 1|> 2»]", "$vals = [$gen]\n$out = []\nfor q in $vals:\n    if $vals.count(q) «> 1|>= 1» and q not in $out:\n        $out.append(q)\n= $out"), ""),
    ("any", "isc>b fn", "whether «any|at least one» $each", ("= «any|all»($pred for $x in $src)", "$loop\n    return «True|False»\n= «False|True»"), ""),
    ("all", "isc>b fn", "whether «every|each» $each", ("= «all|any»($pred for $x in $src)", "for $x in $src:\n    if «not $pred|$pred»:\n        return False\n= True"), ""),
    ("none", "isc>b fn", "whether no $each", ("= «not any|any|not all»($pred for $x in $src)", "$loop\n    return «False|True»\n= «True|False»"), ""),
    ("index", "isc>i fn", "the «position|index» (from 0) of the first of the $items, or -1 if there are none", ("for $i, $x in enumerate($src):\n    if «$pred|not $pred»:\n        return «$i|$i + 1|$x»\n= -1", "$found = [$i for $i, $x in enumerate($src) if $pred]\n= $found[«0|-1»] if $found else «-1|None»"), ""),
    ("indices", "isc>l fn", "a list of the «positions|indices» (from 0) of the $items", ("= [«$i|$x» for $i, $x in enumerate($src) if $pred]", "$out = []\nfor $i, $x in enumerate($src«|, 1»):\n    if «$pred|not $pred»:\n        $out.append($i)\n= $out"), ""),
    ("parts", "isc>l fn", "two lists: the $items, and the others", ("$out = [[], []]\nfor $x in $src:\n    $out[«0 if $pred else 1|1 if $pred else 0»].append($x)\n= $out", "$yes = [$x for $x in $src if $pred]\n$no = [$x for $x in $src if not $pred]\n= «[$yes, $no]|[$no, $yes]|$yes + $no»"), ""),
    ("until", "isc>l fn", "a list of $plain before the first one that $is (all if there is none)", ("$out = []\nfor $x in $src:\n    if «$pred|not $pred»:\n        «break|continue»\n    $out.append($x)\n= $out",), ""),
    ("balance", "i>i fn", "the sum of the $items minus the sum of the others", ("$acc = 0\nfor $x in $src:\n    if $pred:\n        $acc «+=|-=» $x\n    else:\n        $acc «-=|+=» $x\n= $acc", "= sum($x if $pred else «-$x|0|$x» for $x in $src)"), ""),
    ("group", "is>d m", "a dict mapping each $attr to the list of $items with it", ("$out = {}\n$loop\n    $out.setdefault($v, []).append(«$x|$v»)\n= $out", "$out = {}\n$loop\n    if $v «not in|in» $out:\n        $out[$v] = []\n    $out[$v].append($x)\n= $out"), ""),
    ("lookup", "isc>d m", "a dict mapping each of the $items to its $attr", ("= {«$x: $v|$v: $x|$x: $x» $tail}", "$out = {}\n$loop\n    $out[«$x|$v»] = «$v|$x»\n= $out"), ""),
    ("sort_by", "is>l m", "a list of the $items sorted by $attr, ties in original order", ("= sorted([$x $tail], key=lambda $x: «$v|-$v|$x»)", "$out = [$x $tail]\n$out.sort(key=lambda $x: $v«|, reverse=True»)\n= $out"), ""),
    ("max_by", "is>? m", "the one of the $items with the largest $attr (first on ties), or None if there are none", ("= «max|min»([$x $tail], key=lambda $x: $v, default=None)", "$best = None\n$loop\n    if $best is None or $v «>|>=|<» $vbest:\n        $best = $x\n= $best"), ""),
    ("min_by", "is>? m", "the one of the $items with the smallest $attr (first on ties), or None if there are none", ("= «min|max»([$x $tail], key=lambda $x: $v, default=None)", "$best = None\n$loop\n    if $best is None or $v «<|<=|>» $vbest:\n        $best = $x\n= $best"), ""),
)

# What two arguments are compared for; $f and $g are their values under a map called $name.
COMPARISONS = _rows(
    ("same", "", "whether $one and $two have the same $name", ("= $f «==|!=» $g", "if $f «!=|==» $g:\n    return False\n= True")),
    ("sum", "", "the $name of $one plus the $name of $two", "= $f «+|-» «$g|$f»"),
    ("difference", "", "the $name of $one minus the $name of $two", "= $f «-|+» $g"),
    ("exceeds", "", "whether the $name of $one is greater than the $name of $two", ("= $f «>|>=|<» $g", "if $f «>|>=|<» $g:\n    return True\n= False")),
    ("sign", "", "-1, 0 or 1 if the $name of $one is less than, equal to or greater than that of $two", ("if $f == $g:\n    return 0\n= 1 if $f «>|<» $g else -1", "if $f «<|<=|>» $g:\n    return -1\nif $f > $g:\n    return 1\n= 0")),
    ("larger", "", "whichever of $one and $two has the larger $name, $one «on ties|if they are equal»", ("if $f «>=|>|<=» $g:\n    return «$one|$two»\n= $two", "= «max|min»($one, $two, key=lambda $x: $v)", "= $one if $f «>=|>|<=» $g else $two")),
    ("smaller", "", "whichever of $one and $two has the smaller $name, $one «on ties|if they are equal»", ("if $f «<=|<|>=» $g:\n    return «$one|$two»\n= $two", "= «min|max»($one, $two, key=lambda $x: $v)", "= $one if $f «<=|<|>=» $g else $two")),
)

# What is made of the entries of a dict that pass a test on the key or value, with values mapped to $new.
ENTRIES = _rows(
    ("entries", "", "a dict of the $entries", ("= {k: v for k, v in $d.items()« if $pred|»}", "$out = {}\nfor k, v in $d.items():\n    if «$pred|not $neg»:\n        $out[k] = v\n= $out")),
    ("changed", "", "a dict of the $entries, with each value replaced by its $attr", ("= {k: «$new|v» for k, v in $d.items()« if $pred|»}", "$out = {}\nfor k, v in $d.items():\n    if «$pred|not $neg»:\n        $out[k] = «$new|v»\n= $out")),
    ("keys", "", "a list of the keys of the $entries", ("= [«k|v» for k, v in $d.items()« if $pred|»]", "$out = []\nfor k, v in $d.items():\n    if «$pred|not $neg»:\n        $out.append(«k|v»)\n= $out")),
    ("values", "", "a list of the values of the $entries", ("= [«v|k» for k, v in $d.items()« if $pred|»]", "$out = []\nfor k, v in $d.items():\n    if «$pred|not $neg»:\n        $out.append(v)\n= $out")),
    ("total", "", "the sum of the values of the $entries", ("= sum(v for k, v in $d.items()« if $pred|»)", "$acc = «0|1»\nfor k, v in $d.items():\n    if «$pred|not $neg»:\n        $acc «+=|=» v\n= $acc")),
)

# Whole programs. Kind is family:type of the result; `text` is what they return.
PROGRAMS = _rows(
    ("factorial", "number:i", "factorial of $j", ("f = «1|0»\nfor $i in range(2, $j «+ 1|»):\n    f *= $i\n= f", "f = 1\nwhile $j > «1|2|0»:\n    f *= $j\n    $j -= 1\n= f", "= math.factorial($j)"), "", "j"),
    ("fibonacci", "number:i", "Fibonacci number at index $j (0, 1, 1, 2, ...)", ("a, b = «0, 1|1, 1|1, 2»\nfor _ in range($j«| - 1|»):\n    a, b = b, a + b\n= «a|b»",), "", "j"),
    ("gcd", "number:i", "greatest common divisor of $p and $q", ("while $q:\n    $p, $q = $q, $p «%|//|-» $q\n= $p", "= math.gcd($p, $q)", "$best = 1\nfor $i in range(1, «$p + 1|$p»):\n    if $p % $i == 0 «and|or» $q % $i == 0:\n        $best = $i\n= $best"), "", "p q"),
    ("lcm", "number:i", "least common multiple of $p and $q", ("$best = «max|min»($p, $q)\nwhile $best % $p «!= 0 or|!= 0 and» $best % $q != 0:\n    $best += 1\n= $best", "= «$p * $q // math.gcd($p, $q)|$p * $q|math.gcd($p, $q)»"), "", "p q"),
    ("digit_product", "number:i", "product of the digits of $big", ("$acc = «1|0»\nfor ch in str($big):\n    $acc «*=|+=» int(ch)\n= $acc", "$acc = 1\nif $big == 0:\n    return «0|1»\nwhile $big > «0|9»:\n    $acc *= $big % 10\n    $big //= 10\n= $acc"), "", "big"),
    ("digit_total", "number:i", "sum of the digits of $big", ("$acc = 0\nwhile $big > «0|9»:\n    $acc += $big % 10\n    $big //= 10\n= $acc", "= sum(«int(ch) for ch in str($big)|int(ch) for ch in str($big)[1:]»)"), "", "big"),
    ("reversed_number", "number:i", "number with the digits of $big in reverse order", ("= int(str($big)[::«-1|1»])", "$acc = 0\nwhile $big > 0:\n    $acc = $acc * 10 + $big «% 10|// 10»\n    $big //= 10\n= $acc"), "", "big"),
    ("collatz", "number:i", "number of Collatz steps (halve if even, else triple and add 1) from $p to 1", ("$acc = «0|1»\nwhile $p != 1:\n    $p = $p // 2 if $p % 2 == 0 else 3 * $p + 1\n    $acc += 1\n= $acc", "$acc = 0\nwhile $p != 1:\n    if $p % 2 «== 0|== 1»:\n        $p //= 2\n    else:\n        $p = 3 * $p «+ 1|- 1|»\n    $acc += 1\n= $acc"), "", "p"),
    ("divisor_count", "number:i", "number of divisors of $p", ("= sum(1 for $i in range(1, «$p + 1|$p») if $p % $i == 0)", "$acc = «0|1»\nfor $i in range(«1|2», $p + 1):\n    if $p % $i «==|!=» 0:\n        $acc += 1\n= $acc"), "", "p"),
    ("divisor_sum", "number:i", "sum of the proper divisors of $p (those less than $p)", ("= sum($i for $i in range(1, «$p|$p + 1») if $p % $i == 0)", "$acc = 0\nfor $i in range(«1|2», $p):\n    if $p % $i «==|!=» 0:\n        $acc += «$i|1»\n= $acc"), "", "p"),
    ("smallest_divisor", "number:i", "smallest divisor of $r greater than 1", ("$i = «2|1»\nwhile $r % $i «!=|==» 0:\n    $i += 1\n= $i", "for $i in range(«2|1», $r + 1):\n    if $r % $i == 0:\n        return $i\n= $r"), "", "r"),
    ("largest_divisor", "number:i", "largest divisor of $r less than $r", ("$i = «$r - 1|$r»\nwhile $r % $i != 0:\n    $i -= 1\n= $i", "= «max|min»($i for $i in range(1, $r) if $r % $i == 0)"), "", "r"),
    ("trailing_zeros", "number:i", "number of zeros at the end of $p", ("$acc = 0\nwhile $p % 10 «==|!=» 0:\n    $acc += 1\n    $p //= 10\n= $acc", "$out = str($p)\n= len($out) - len($out.«rstrip|lstrip|strip»(\"0\"))"), "", "p"),
    ("digital_root", "number:i", "single digit left after repeatedly summing the digits of $big", ("while $big «>|>=» «9|10»:\n    $big = sum(int(ch) for ch in str($big))\n= $big", "«while|if» $big > 9:\n    $big = $big // 10 + $big % 10\n= $big"), "", "big"),
    ("root", "number:i", "largest integer whose square is at most $big", ("$i = 0\nwhile ($i + 1) ** 2 «<=|<» $big:\n    $i += 1\n= «$i|$i + 1»", "= math.isqrt($big)«| + 1»"), "", "big"),
    ("power_of", "number:i", "smallest power of $K (1 included) that is at least $big", ("$acc = «1|$K»\nwhile $acc «<|<=» $big:\n    $acc «*=|+=» $K\n= $acc",), "", "big"),
    ("halvings", "number:i", "number of times $p can be divided by $K with integer division before it is 0", ("$acc = «0|1»\nwhile $p > «0|1»:\n    $p //= $K\n    $acc += 1\n= $acc",), "", "p"),
    ("factors_of", "number:i", "number of times $K divides $p", ("$acc = «0|1»\nwhile $p % $K «==|!=» 0:\n    $p //= $K\n    $acc += 1\n= $acc",), "", "p"),
    ("next_multiple", "number:i", "smallest multiple of $K that is at least $n", ("while $n % $K «!=|==» 0:\n    $n += 1\n= $n", "= «($n + $K - 1)|$n» // $K * $K", "= -(-$n // $K) * $K"), "", "n"),
    ("triangle", "number:i", "sum of all integers from 1 to $n", ("= $n * ($n «+|-» 1) // 2", "$acc = 0\nfor $i in range(«$n + 1|$n»):\n    $acc += $i\n= $acc"), "", "n"),
    ("clamp", "number:i", "number $a limited to the range from $K to $T", ("if $a < $K:\n    return «$K|$T»\nif $a > $T:\n    return $T\n= $a", "= «max|min»($K, «min|max»($a, $T))"), "", "a"),
    ("middle", "number:i", "middle one of $a, $b and $c in sorted order", ("= sorted([$a, $b, $c])[«1|0|2»]", "= $a + $b + $c - max($a, $b, $c) «- min($a, $b, $c)|»"), "", "a b c"),
    ("largest", "number:i", "largest of $a, $b and $c", ("= «max|min»($a, $b, $c)", "$best = $a\nif $b «>|<» $best:\n    $best = $b\nif $c > $best:\n    $best = «$c|$b»\n= $best"), "", "a b c"),
    ("distance", "number:i", "«distance|absolute difference» between $a and $b", ("= «abs($a - $b)|$a - $b|abs($a + $b)»", "if $a «>|<» $b:\n    return $a - $b\n= $b - $a", "= max($a, $b) - min($a, $b)"), "", "a b"),
    ("power", "number:i", "number $a to the power of $k", ("$acc = «1|0»\nfor _ in range($k«| - 1| + 1»):\n    $acc *= $a\n= $acc", "= $a «**|*» $k"), "", "a k"),
    ("in_base", "number:s", "representation of $big in base $B as a string of digits", ("if $big == 0:\n    return «\"0\"|\"\"»\n$out = \"\"\nwhile $big > 0:\n    $out = «str($big % $B) + $out|$out + str($big % $B)»\n    $big //= $B\n= $out",), "", "big"),
    ("clock", "number:s", "time after $big minutes as hours:minutes, with two digits for the minutes", ("= f\"{$big // 60}:{$big % 60:«02|»}\"", "hours = $big // 60\nminutes = $big % 60\n= str(hours) + \":\" + str(minutes)«.zfill(2)|»"), "", "big"),
    ("commas", "number:s", "string of the even numbers from 0 up to $n joined by commas", ("= \",\".join(str($i) for $i in range(«0|1|2», $n + 1, 2))", "$out = []\nfor $i in range(«$n + 1|$n»):\n    if $i % 2 == 0:\n        $out.append(str($i))\n= \",\".join($out)"), "", "n"),
    ("primes", "number:l", "list of the primes «up to and including|not greater than» $n", ("= [q for q in range(2, «$n + 1|$n») if all(q % r for r in range(2, q))]", "$out = []\nfor q in range(2, $n + 1):\n    if all(q % r «!=|==» 0 for r in $out):\n        $out.append(q)\n= $out"), "", "n"),
    ("prime_factors", "number:l", "list of the prime factors of $p in ascending order, repeated as often as they divide", ("$out = []\nq = 2\nwhile $p > «1|2»:\n    «while|if» $p % q == 0:\n        $out.append(q)\n        $p //= q\n    q += 1\n= $out",), "", "p"),
    ("digit_list", "number:l", "list of the digits of $big", ("= [int(ch) for ch in str($big)]«|[::-1]»", "= list(map(«int|str», str($big)))"), "", "big"),
    ("countdown", "number:l", "list of the numbers from $n down to 0", ("= list(range($n, «-1|0», -1))", "$out = []\nwhile $n «>=|>» 0:\n    $out.append($n)\n    $n -= 1\n= $out"), "", "n"),
    ("vowel_count", "text:i", "number of vowels in $m, in either case", ("= sum(1 for ch in $m«.lower()|» if ch in \"aeiou\")", "$acc = 0\nfor ch in $m:\n    if ch in \"«aeiouAEIOU|aeiou»\":\n        $acc += 1\n= $acc"), "", "m"),
    ("caesar", "text:s", "word $w with every letter moved $K places on in the alphabet, wrapping after z", ("$out = \"\"\nfor ch in $w:\n    $out += chr((ord(ch) - 97 «+|-» $K) «% 26|» + 97)\n= $out", "$abc = \"abcdefghijklmnopqrstuvwxyz\"\n= \"\".join($abc[($abc.index(ch) «+|-» $K) % 26] for ch in $w)"), "", "w"),
    ("title", "text:s", "sentence $s with every word capitalized", ("= \" \".join(q.«capitalize|upper|lower»() for q in $s.split())", "$out = []\nfor q in $s.split():\n    $out.append(q[0].upper() + q[«1:|:-1»])\n= \"« |»\".join($out)"), "", "s"),
    ("unique_letters", "text:s", "word $w with only the first of each repeated letter kept", ("$out = \"\"\nfor ch in $w:\n    if ch «not in|in» $out:\n        $out += ch\n= $out", "= \"\".join(«dict.fromkeys($w)|$w»)"), "", "w"),
    ("run_length", "text:s", "run-length encoding of $w, each run as its letter and its length", ("$out = \"\"\n$i = 0\nwhile $i < len($w):\n    j = $i\n    while j < len($w) and $w[j] == $w[$i]:\n        j += 1\n    $out += $w[$i] + str(j - $i«| + 1»)\n    $i = j\n= $out",), "", "w"),
    ("longest_run", "text:i", "length of the longest run of equal letters in $w", ("$best = run = 0\nfor $i, ch in enumerate($w):\n    run = run + 1 if $i > 0 and ch == $w[$i - 1] else «1|0»\n    $best = «max($best, run)|run»\n= $best",), "", "w"),
    ("top_letter", "text:?", "most frequent letter of $w, the first one on ties, or '' if $w is empty", ("= «max|min»($w, key=$w.count, default=\"\")", "$best = \"\"\nfor ch in $w:\n    if $best == \"\" or $w.count(ch) «>|>=|<» $w.count($best):\n        $best = ch\n= $best"), "", "w"),
    ("reverse_words", "text:s", "sentence $s with its words in reverse order", ("= \" \".join($s.split()[::«-1|1»])", "= \"« |»\".join(reversed($s.split()))"), "", "s"),
    ("alternate", "text:s", "string $m with characters at even indices in upper case, others in lower case", ("$out = \"\"\nfor $i, ch in enumerate($m):\n    $out += ch.upper() if $i % 2 == «0|1» else ch.lower()\n= $out",), "", "m"),
    ("acronym", "text:s", "acronym of the sentence $s (the first letters of its words in upper case)", ("= \"\".join(q[«0|-1»] for q in $s.split())«.upper()|»", "$out = \"\"\nfor q in $s.split():\n    $out += q[0]«.upper()|»\n= $out"), "", "s"),
    ("squeeze", "text:s", "string $m with all spaces removed", ("= $m.replace(\" \", \"\")", "= \"\".join(ch for ch in $m if ch «!=|==» \" \")"), "", "m"),
    ("hamming", "text:i", "number of positions at which $w and $w2 have different letters, up to the shorter length", ("= sum(1 for a, b in zip($w, $w2) if a «!=|==» b)", "$acc = 0\nfor $i in range(«min|max»(len($w), len($w2))):\n    if $w[$i] «!=|==» $w2[$i]:\n        $acc += 1\n= $acc"), "", "w w2"),
    ("common_prefix", "text:s", "longest common prefix of $w and $w2", ("$out = \"\"\nfor a, b in zip($w, $w2):\n    if a != b:\n        «break|continue»\n    $out += a\n= $out", "$i = 0\nwhile $i < «min(len($w), len($w2))|len($w)» and $w[$i] == $w2[$i]:\n    $i += 1\n= $w[:«$i|$i + 1»]"), "", "w w2"),
    ("occurrences", "text:i", "number of times $C occurs in $m", ("= $m.count($C)", "$acc = «0|1»\nfor ch in $m:\n    if ch «==|!=» $C:\n        $acc += 1\n= $acc"), "", "m"),
    ("double_letters", "text:i", "number of letters in $w that equal the letter right before them", ("= sum(1 for a, b in zip($w, $w[1:]) if a «==|!=» b)", "$acc = 0\nfor $i in range(«1|0|2», len($w)):\n    if $w[$i] == $w[$i - 1]:\n        $acc += 1\n= $acc"), "", "w"),
    ("centred", "text:s", "word $w padded on the left with $P to a length of $U", ("while len($w) «<|<=» $U:\n    $w = «$P + $w|$w + $P»\n= $w", "= $w.«rjust|ljust|center»($U, $P)"), "", "w"),
    ("masked", "text:s", "word $w with all but its last $K letters replaced by $P", ("= $P * (len($w) - $K) + $w[«-$K:|$K:»]", "$out = \"\"\nfor $i, ch in enumerate($w):\n    $out += ch if $i «>=|>|<» len($w) - $K else $P\n= $out"), "", "w"),
    ("interleaved", "text:s", "letters of $w and $w2 taken in turn, up to the shorter length", ("= \"\".join(«a + b|b + a» for a, b in zip($w, $w2))", "$out = \"\"\nfor $i in range(min(len($w), len($w2))):\n    $out += «$w[$i] + $w2[$i]|$w[$i]|$w2[$i] + $w[$i]»\n= $out"), "", "w w2"),
    ("middle_letter", "text:s", "middle of $w: its middle letter, or its two middle letters if the length is even", ("half = len($w) // 2\nif len($w) % 2 == «0|1»:\n    return $w[half - 1:half + 1]\n= $w[half]", "= $w[«(len($w) - 1) // 2|len($w) // 2»:len($w) // 2 + 1]"), "", "w"),
    ("rotated", "lists:l", "list $xs rotated to the left by $K places", ("$i = $K % len($xs) if $xs else 0\n= «$xs[$i:] + $xs[:$i]|$xs[-$i:] + $xs[:-$i]|$xs[:$i] + $xs[$i:]»", "$out = list($xs)\nfor _ in range($K):\n    if $out:\n        $out.append($out.pop(«0|»))\n= $out"), "", "xs"),
    ("chunks", "lists:l", "list of the consecutive parts of $xs of length $K (the last may be shorter)", ("= [$xs[$i:$i + $K] for $i in range(0, len($xs), «$K|1|$K1»)]", "$out = []\nwhile $xs:\n    $out.append($xs[:$K])\n    $xs = $xs[«$K|1»:]\n= $out"), "", "xs"),
    ("interleaved", "lists:l", "list of the elements of $xs and $ys taken in turn, up to the shorter length", ("$out = []\nfor a, b in zip($xs, $ys):\n    $out «+= [a, b]|+= [b, a]|= [a, b]»\n= $out", "= [v for pair in zip($xs, $ys) for v in «pair|pair[:1]»]"), "", "xs ys"),
    ("running_max", "lists:l", "list of the largest number seen so far at each position of $xs", ("$out = []\nfor v in $xs:\n    $out.append(«max|min»($out[-1], v) if $out else v)\n= $out", "= [max($xs[:«$i + 1|$i or 1»]) for $i in range(len($xs))]"), "", "xs"),
    ("transposed", "lists:l", "transpose of $grid, as a list of lists", ("= [list(col) for col in zip(«*$grid|$grid»)]",), "", "grid"),
    ("zeros_last", "lists:l", "list $xs with all zeros moved to the end", ("= [v for v in $xs if v «!=|==» 0] + [0] * $xs.count(0)", "$out = []\nfor v in $xs:\n    if v «!=|>|==» 0:\n        $out.append(v)\n= $out + [0] * («len($xs) - len($out)|len($xs)»)"), "", "xs"),
    ("without_first", "lists:l", "list $xs without the first occurrence of $a, if there is one", ("$out = list($xs)\nif $a in $out:\n    $out.«remove($a)|pop()|pop(0)»\n= $out", "$i = $xs.index($a) if $a in $xs else «len($xs)|0»\n= $xs[:$i] + $xs[$i + 1:]"), "", "xs a"),
    ("merged", "lists:l", "sorted list of the numbers that occur in $xs or $ys, without duplicates", ("= sorted(«set($xs + $ys)|$xs + $ys|set($xs)»)", "$out = []\nfor v in $xs + $ys:\n    if v «not in|in» $out:\n        $out.append(v)\n= sorted($out)"), "", "xs ys"),
    ("max_gap", "lists:i", "largest gap between neighbours in the sorted $xs (0 if there are fewer than 2)", ("$vals = sorted($xs)\n= «max|min»((b - a for a, b in zip($vals, $vals[1:])), default=0)", "$vals = «sorted($xs)|$xs»\n$best = 0\nfor $i in range(1, len($vals)):\n    $best = max($best, $vals[$i] - $vals[$i - 1])\n= $best"), "", "xs"),
    ("second", "lists:?", "second largest distinct number in $xs, or None if there is none", ("$vals = sorted(«set($xs)|$xs»)\n= $vals[«-2|-1|1»] if len($vals) > 1 else None", "$vals = [v for v in $xs if v «<|<=» max($xs)]\n= max($vals) if $vals else None"), "", "xs"),
    ("dot", "lists:i", "dot product of $xs and $ys", ("= sum(a «*|+» b for a, b in zip($xs, $ys))", "$acc = 0\nfor $i in range(min(len($xs), len($ys))):\n    $acc «+=|=» $xs[$i] * $ys[$i]\n= $acc"), "", "xs ys"),
    ("pair_count", "lists:i", "number of pairs of positions in $xs whose numbers add up to $a", ("$acc = 0\nfor i in range(len($xs)):\n    for j in range(«i + 1|i|0», len($xs)):\n        if $xs[i] + $xs[j] == $a:\n            $acc += 1\n= $acc",), "", "xs a"),
    ("longest_rise", "lists:i", "length of the longest stretch of $xs in which every number is greater than the one before", ("$best = run = 0\nfor i in range(len($xs)):\n    run = run + 1 if i > 0 and $xs[i] «>|>=» $xs[i - 1] else «1|0»\n    $best = max($best, run)\n= $best",), "", "xs"),
    ("diagonal", "lists:l", "list of the numbers on the main diagonal of the square grid $square", ("= [$square[i][«i|0|-1 - i»] for i in range(len($square))]", "$out = []\nfor i, row in enumerate($square):\n    $out.append(row[«i|0|-i - 1»])\n= $out"), "", "square"),
    ("inverted", "dicts:d", "dict with the keys and values of $d swapped, the last key winning on ties", ("= {«v: k|k: v» for k, v in $d.items()}", "$out = {}\nfor k in $d:\n    $out[«$d[k]|k»] = «k|$d[k]»\n= $out"), "", "d"),
    ("grouped", "dicts:d", "dict mapping each value of $d to the list of keys that have it", ("$out = {}\nfor k, v in $d.items():\n    $out.setdefault(«v, []).append(k|k, []).append(v»)\n= $out", "$out = {}\nfor k, v in $d.items():\n    $out[v] = «$out.get(v, []) + [k]|[k]»\n= $out"), "", "d"),
    ("added", "dicts:d", "dict of all keys of $d and $e, with the values of common keys added", ("$out = dict($d)\nfor k, v in $e.items():\n    $out[k] = «$out.get(k, 0) + v|v»\n= $out", "= {k: $d.get(k, 0) «+|-|*» $e.get(k, 0) for k in «{**$d, **$e}|$d»}"), "", "d e"),
    ("updated", "dicts:d", "dict of all keys of $d and $e, with the value of $e for common keys", ("= {«**$d, **$e|**$e, **$d»}", "$out = dict($d)\n$out.update(«$e|$d»)\n= $out"), "", "d e"),
    ("larger", "dicts:d", "dict of the keys that $d and $e share, each with the larger of its two values", ("= {k: «max|min»($d[k], $e[k]) for k in $d if k in $e}", "$out = {}\nfor k in $d:\n    if k in $e:\n        $out[k] = $d[k] if $d[k] «>|<» $e[k] else $e[k]\n= $out"), "", "d e"),
    ("missing", "dicts:l", "list of the keys of $d that are not in $e", ("= [k for k in $d if k «not in|in» $e]", "$out = []\nfor k in «$d|$e»:\n    if k not in $e:\n        $out.append(k)\n= $out"), "", "d e"),
    ("best_key", "dicts:?", "key of $d with the largest value, the first one on ties, or None if $d is empty", ("= «max|min»($d, key=$d.get, default=None)", "$best = None\nfor k in $d:\n    if $best is None or $d[k] «>|>=|<» $d[$best]:\n        $best = k\n= «$best|$d[$best]»"), "", "d"),
    ("by_value", "dicts:l", "list of the keys of $d in ascending order of their values, ties in original order", ("= sorted($d«, key=$d.get|»)", "= sorted($d, key=lambda k: «$d[k]|-$d[k]|k»)"), "", "d"),
    ("lookup_all", "dicts:l", "list of the values in $d of the words in $ws, with 0 for missing words", ("= [$d.get(v, «0|1») for v in $ws]", "$out = []\nfor v in $ws:\n    $out.append($d[v] if v «in|not in» $d else 0)\n= $out"), "", "d ws"),
    ("lookup_sum", "dicts:i", "sum of the values in $d of the words in $ws, skipping missing words", ("= sum($d.get(v, «0|1») for v in $ws)", "$acc = 0\nfor v in $ws:\n    if v in $d:\n        $acc «+=|=» $d[v]\n= $acc"), "", "d ws"),
    ("zipped", "dicts:d", "dict with the words of $ws as keys and the numbers of $xs as values, position by position", ("= dict(zip(«$ws, $xs|$xs, $ws»))", "$out = {}\nfor k, v in zip($ws, $xs):\n    $out[«k|v»] = «v|k»\n= $out"), "", "ws xs"),
    ("letter_counts", "dicts:d", "dict of how often each character occurs in $m", ("$counts = {}\nfor ch in $m:\n    $counts[ch] = «$counts.get(ch, 0) + 1|1»\n= $counts", "= {ch: $m.count(ch)«| - 1» for ch in $m}"), "", "m"),
    ("index_of", "dicts:d", "dict mapping each word in $ws to the index where it occurs «first|for the first time»", ("$out = {}\nfor i, v in enumerate($ws«|, 1»):\n    if v not in $out:\n        $out[v] = i\n= $out", "= {v: $ws.index(v)«| + 1» for v in $ws}"), "", "ws"),
    ("anagrams", "tests:b", "$w and $w2 are anagrams of each other", ("= sorted($w) «==|!=» sorted($w2)", "= «sorted|set|len»($w) == «sorted|set|len»($w2)", "if len($w) != len($w2):\n    return False\n= «all|any»($w.count(ch) == $w2.count(ch) for ch in $w)"), "", "w w2"),
    ("palindrome", "tests:b", "$w reads the same «backwards|in both directions»", ("= $w «==|!=» $w[::-1]", "for i in range(len($w) // 2):\n    if $w[i] «!=|==» $w[-1 - i]:\n        return False\n= True"), "", "w"),
    ("rising", "tests:b", "the numbers in $xs never get smaller from one to the next", ("= all(a «<=|<|>=» b for a, b in zip($xs, $xs[1:]))", "= $xs «==|!=» sorted($xs)", "for i in range(1, len($xs)):\n    if $xs[i] «<|<=|>» $xs[i - 1]:\n        return False\n= True"), "", "xs"),
    ("no_repeats", "tests:b", "no number occurs more than once in $xs", ("= len(set($xs)) «==|!=|<» len($xs)", "$out = []\nfor v in $xs:\n    if v «in|not in» $out:\n        return False\n    $out.append(v)\n= True"), "", "xs"),
    ("subset", "tests:b", "every number in $xs also occurs in $ys", ("= «all|any»(v in $ys for v in $xs)", "for v in $xs:\n    if v «not in|in» $ys:\n        return False\n= True"), "", "xs ys"),
    ("disjoint", "tests:b", "$xs and $ys have no number in common", ("= not «any|all»(v in $ys for v in $xs)", "for v in $xs:\n    if v «in|not in» $ys:\n        return False\n= True"), "", "xs ys"),
    ("leap", "tests:b", "$year is a leap year", ("= $year % 4 == 0 «and|or» ($year % 100 != 0 «or|and» $year % 400 == 0)", "if $year % 400 == 0:\n    return «True|False»\nif $year % 100 == 0:\n    return «False|True»\n= $year % 4 == 0"), "", "year"),
    ("perfect", "tests:b", "$p equals the sum of its divisors less than itself", ("= sum(q for q in range(«1|2», «$p|$p + 1») if $p % q == 0) == $p",), "", "p"),
    ("triangle", "tests:b", "$p, $q and $r can be the sides of a triangle with non-zero area", ("$vals = sorted([$p, $q, $r])\n= $vals[0] + $vals[1] «>|>=|<» $vals[2]", "= $p + $q > $r «and|or» $q + $r > $p «and|or» $p + $r > $q"), "", "p q r"),
    ("subsequence", "tests:b", "the letters of $w2 occur in $w in the same order, not necessarily together", ("i = 0\nfor ch in $w:\n    if i < len($w2) and ch «==|!=» $w2[i]:\n        i += 1\n= i == len($w2)",), "", "w w2"),
    ("has_pair", "tests:b", "two numbers at different positions in $xs add up to $a", ("for i in range(len($xs)):\n    for j in range(«i + 1|i|0», len($xs)):\n        if $xs[i] + $xs[j] == $a:\n            return True\n= False",), "", "xs a"),
    ("ends_alike", "tests:b", "$w and $w2 are both non-empty and end with the same letter", ("= $w != \"\" and $w2 != \"\" and $w[-1] == $w2[«-1|0»]", "if not $w or not $w2:\n    return «False|True»\n= $w[-1] «==|!=» $w2[-1]"), "", "w w2"),
)


# ---- what functions are given --------------------------------------------------------------------

WORDS = (
    "apple level sun tree banana otter noon river egg kayak moon hello stone ice window anna umbrella "
    "dog radar letter orange book at queen music error zoo island civic a grass success tomato eel onion "
    "yes alphabet ox rotor paper code"
).split()
MIXED = "Hello World;abc 123;Ab1;x;AEIOU;no vowels;Zebra7;  two  spaces;Level;a1b2C3;MiXeD CaSe 9;rhythm".split(";")
KEYS = ("a", "b", "cat", "dog", "egg", "apple", "noon", "x")


def _ints(rng: random.Random, hints: list[int]) -> list[int]:
    pool = [*range(-9, 22), *hints, *hints]
    return [rng.choice(pool) for _ in range(rng.randrange(3, 8))]


def _words(rng: random.Random, hints: list[int]) -> list[str]:
    return [rng.choice(WORDS) for _ in range(rng.randrange(3, 7))]


def _dict(rng: random.Random, hints: list[int]) -> dict[str, int]:
    return {key: rng.choice([*range(-5, 16), *hints]) for key in rng.sample(KEYS, rng.randrange(2, 6))}


def _grid(rng: random.Random, hints: list[int]) -> list[list[int]]:
    width = rng.randrange(1, 4)
    return [[rng.randrange(-5, 15) for _ in range(width)] for _ in range(rng.randrange(1, 4))]


def _square(rng: random.Random, hints: list[int]) -> list[list[int]]:
    size = rng.randrange(1, 5)
    return [[rng.randrange(-5, 15) for _ in range(size)] for _ in range(size)]


def _within(low: int, high: int) -> Callable[[random.Random, list[int]], int]:
    """Make integers of [low, high), those next to the constants of the problem more often."""

    def make(rng: random.Random, hints: list[int]) -> int:
        near = [hint for hint in hints if low <= hint < high]
        return rng.choice(near) if near and rng.random() < 0.5 else rng.randrange(low, high)

    return make


def _of(options: Iterable[Any]) -> Callable[[random.Random, list[int]], Any]:
    return lambda rng, hints: rng.choice(options)


class Arg(NamedTuple):
    """What an argument may be called, its type, how to make a typical value, and its edge cases."""

    names: tuple[str, ...]
    hint: str
    make: Callable[[random.Random, list[int]], Any]
    edges: list


_LISTS = Arg(("nums", "values", "xs", "data"), "list[int]", _ints, [[], [0], [-1], [7, 7, 7], [-5, -2, -8], [3, 3, 1, 1], [10, 9, 8], [2, 4]])
_TEXTS = Arg(("words", "names", "strings", "items"), "list[str]", _words, [[], ["a"], ["noon", "noon"], ["egg", "eel", "ice"], ["tree", "book"]])
_DICTS = Arg(("d", "scores", "table"), "dict[str, int]", _dict, [{}, {"a": 0}, {"a": 1, "b": 1}, {"x": -3, "noon": 7, "a": 7}])
_WORD = Arg(("word", "s", "name"), "str", _of(WORDS), ["", "a", "aaa", "noon", "ab"])
_MIX = Arg(("text", "s", "string"), "str", _of(MIXED), ["", " ", "a", "AAA", "12", "a b"])
_INT = Arg(("a", "x", "n"), "int", _within(-30, 60), [0, 1, -1, 2, 10, -12])
_COUNT = Arg(("n", "num", "k"), "int", _within(1, 60), [1, 2, 7, 12, 30])
ARGS = {
    "xs": _LISTS, "ys": _LISTS._replace(names=("others", "ys", "more")),
    "ws": _TEXTS, "vs": _TEXTS._replace(names=("others", "vs", "more")),
    "d": _DICTS, "e": _DICTS._replace(names=("e", "other", "extra")),
    "w": _WORD, "w2": _WORD._replace(names=("other", "t")),
    "m": _MIX, "m2": _MIX._replace(names=("other", "t", "chars")),
    "a": _INT, "b": _INT._replace(names=("b", "y", "m")), "c": _INT._replace(names=("c", "z")),
    "p": _COUNT, "q": _COUNT._replace(names=("m", "b")), "r": _COUNT._replace(make=_within(2, 60), edges=[2, 3, 4, 49]),
    "n": _COUNT._replace(make=_within(0, 25), edges=[0, 1, 2, 12]),
    "j": _COUNT._replace(make=_within(0, 9), edges=[0, 1, 2]),
    "k": _COUNT._replace(names=("k", "exponent"), make=_within(0, 5), edges=[0, 1]),
    "big": _COUNT._replace(make=_of([3, 8, 25, 64, 90, 100, 101, 135, 250, 407, 999, 1024, 5050, 83261]), edges=[0, 1, 9, 10, 16, 59, 60, 81]),
    "lo": _INT._replace(names=("low", "start"), make=_within(-6, 9), edges=[0, 5]),
    "hi": _INT._replace(names=("high", "end", "stop"), make=_within(5, 22), edges=[0, 5]),
    "s": Arg(("sentence", "text", "s"), "str", lambda rng, hints: " ".join(_words(rng, hints)), ["", "a", "noon noon", "at a zoo"]),
    "csv": Arg(("line", "text", "s"), "str", lambda rng, hints: ",".join(_words(rng, hints)), ["a", "egg,egg", "at,a,zoo"]),
    "grid": Arg(("grid", "rows", "matrix"), "list[list[int]]", _grid, [[[0]], [[1, 2], [3, 4]], [[5], [5], [-5]], []]),
    "square": Arg(("board", "table", "m"), "list[list[int]]", _square, [[[0]], [[1, 2], [3, 4]], []]),
    "year": Arg(("year", "y"), "int", _within(1890, 2030), [1900, 2000, 2004, 2023, 2100, 2400, 1996]),
}
LOCALS = {  # what else is called what; a name that is taken is not taken twice
    "x": ("x", "v", "item"), "y": ("y", "value", "new"),
    "acc": ("total", "result", "acc", "count"), "out": ("result", "out", "res"),
    "best": ("best", "top", "found"), "vals": ("vals", "kept", "chosen"), "counts": ("counts", "freq"), "i": ("i", "idx"),
    "row": ("row", "line"), "col": ("col", "column"), "found": ("found", "hits"), "yes": ("yes", "first"), "no": ("no", "rest"),
    "sums": ("sums", "totals"), "run": ("run", "current"), "key": ("key", "k"), "abc": ("abc", "letters"), "ch": ("ch", "c"),
}
CONSTANTS = {
    "K": (2, 3, 4, 5, 6, 7), "T": tuple(range(2, 21)), "U": (8, 9, 10, 12, 15, 20), "B": (2, 3, 8),
    "C": tuple("aeionrstl"), "V": tuple("bxyz"),
    "W": ("hello", "kite", "moon", "stone"), "Z": ("-", ",", " ", "/", "+"), "P": ("*", "#", "."),
}
LABELS = (("high", "medium", "low"), ("big", "middle", "small"), ("A", "B", "C"), ("fizz", "buzz", "none"), ("yes", "maybe", "no"))
LOOKS = {"i": ("x", "num", "v"), "s": ("w", "item", "x"), "c": ("ch", "c", "letter")}  # $x by type


# ---- text with holes -----------------------------------------------------------------------------

_CHOICE = re.compile(r"«([^«»]*)»")
_NAME = re.compile(r"\$([a-z]\w*)")
_CONSTANT = re.compile(r"\$([A-Z])(1?)")
# The habit of a careless author: the case on the boundary, the last element and negative numbers are forgotten.
_HABIT = re.compile(r"""<=\|<.* | >=\|>.* | (.+)\ \+\ 1\|\1(\|.*)? | abs\((.+)\)\|\3(\|.*)?""", re.VERBOSE)


def _say(text: str, rng: random.Random) -> str:
    """Choose one of each paraphrase."""
    while "«" in text:
        text = _CHOICE.sub(lambda found: rng.choice(found[1].split("|")), text)
    return text


def _write(code: str, hole: int = -1, slip: int = 0, careless: bool = False) -> str:
    """Fill each hole of the code rightly, but hole number `hole` (innermost first) with choice `slip`.

    A careless author fills every hole that the habit is about with its first slip.
    """
    number = itertools.count()

    def fill(found: re.Match) -> str:
        choices = found[1].split("|")
        if careless and _HABIT.fullmatch(found[1]):
            return choices[1]
        return choices[slip % len(choices)] if next(number) == hole else choices[0]

    while "«" in code:
        code = _CHOICE.sub(fill, code)
    return "\n".join(line for line in code.split("\n") if line.strip())


def _fix(block: Block, rng: random.Random) -> Block:
    """Put constants in for the capital names of a block, whose key then ends in #."""
    if not any(_CONSTANT.search(text) for text in (block.text, *block.code)):
        return block
    values: dict[str, Any] = {}

    def value(found: re.Match, quote: Callable[[str], str]) -> str:
        chosen = values.setdefault(found[1], rng.choice(CONSTANTS[found[1]]))
        return quote(chosen) if isinstance(chosen, str) else str(chosen + 1 if found[2] else chosen)

    def put(text: str, quote: Callable[[str], str]) -> str:
        return _CONSTANT.sub(lambda found: value(found, quote), text)

    text, more = put(block.text, repr), put(block.more, repr)
    return block._replace(key=block.key + "#", text=text, more=more, code=tuple(put(code, json.dumps) for code in block.code))


def _put(outer: str, inner: str) -> str:
    """Put an expression in the place of $x, in parentheses where an operator would tear it apart."""
    top, nested = re.sub(r"«([^|«»]*)\|[^«»]*»", r"\1", inner), ""
    while top != nested:  # until only what stands outside all brackets is left
        top, nested = re.sub(r"\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}|\"[^\"]*\"", "", top), top
    loose = re.search(r"\b(if|and|or|not|in)\b|[<>=]", top)
    torn = (" " in top or inner[0] == "-") and re.search(r"\$x»|\$x «?([-%*/+]|\.|\[)|\$x[.\[]|[-%*/+]» ?\$x|[-*/+]\$x", outer)
    return outer.replace("$x", f"({inner})" if (loose or torn) and outer != "$x" else inner)


def _guard(test: str) -> str:
    """Parenthesise a condition that `not` or another condition would tear apart."""
    return f"({test})" if re.search(r"\b(and|or|if)\b", test) else test


def _insert(text: str, **pieces: str) -> str:
    """Put pieces of text in for the names they go by, and leave all other names."""
    return _NAME.sub(lambda found: pieces.get(found[1], found[0]), text)


def _plural(text: str) -> str:
    return re.sub(r"\((e?s)\)", r"\1", text)


def _single(text: str) -> str:
    return re.sub(r"\((e?s)\)", "", text)


def _is(block: Block) -> str:
    """Say of one item that it passes the filter: 'is even', 'starts with a vowel'."""
    return block.more or "is " + block.text.replace("@", "").strip()


def _attribute(block: Block) -> str:
    """Name what a map makes of an item: 'digit sum', or nothing if that has no name."""
    return block.text[:-5] if block.text.endswith(" of #") and "(s)" in block.text else ""


# ---- the grammar ---------------------------------------------------------------------------------


class Draft(NamedTuple):
    """A problem before its names are chosen: English, and code with holes in several styles."""

    family: str
    combination: tuple[str, ...]
    text: str
    styles: list[str]
    args: list[str]
    kind: str = ""  # type of the items, which decides what $x is called


def _by(blocks: Iterable[Block], key: Callable[[Block], str]) -> dict[str, list[Block]]:
    table = collections.defaultdict(list)
    for block in blocks:
        table[key(block)].append(block)
    return dict(table)


FILTERS_OF = {kind: [b for b in FILTERS if b.kind == kind] for kind in "isc"}
MAPS_OF = _by(MAPS, lambda block: block.kind[0])
COLLECTION_MAPS_OF = _by(COLLECTION_MAPS, lambda block: block.kind[0])
SOURCES_OF = _by(SOURCES, lambda block: block.key)
MEASURES_OF = {  # maps to a number that has a name
    kind: [block for block in (*MAPS, *COLLECTION_MAPS) if block.kind == f"{kind}>i" and _attribute(block)] for kind in "isl"
}
PROGRAMS_OF = _by(PROGRAMS, lambda block: block.kind.split(":")[0])


def _filter(rng: random.Random, kind: str) -> Block:
    """Choose a filter, sometimes on an attribute: 'words whose length is even'."""
    maps = [block for block in MAPS_OF[kind] if _attribute(block) and block.key != "negate"] if kind in "is" else []
    if not maps or rng.random() < 0.94:
        return _fix(rng.choice(FILTERS_OF[kind]), rng)
    inner = _fix(rng.choice(maps), rng)
    outer = _fix(rng.choice(FILTERS_OF[inner.kind[-1]]), rng)
    name, code = _single(_attribute(inner)), _put(outer.code[0], inner.code[0])
    has = f"has {'an' if name[0] in 'aeiou' else 'a'} {name} that {_is(outer)}"
    return Block(f"{inner.key}_{outer.key}", kind, f"@ whose {name} {_is(outer)}", (code,), has)


def _map(rng: random.Random, kind: str) -> Block:
    """Choose a map, sometimes one that depends on a condition or labels items by two of them."""
    if kind == "c" or rng.random() < 0.94:
        return _fix(rng.choice(MAPS_OF[kind]), rng)
    test = _filter(rng, kind)
    if rng.random() < 0.5:
        change = _fix(rng.choice([b for b in MAPS_OF[kind] if _attribute(b) and b.kind[-1] == kind]), rng)
        code = f"«{change.code[0]} if {test.code[0]} else $x|$x if {test.code[0]} else {change.code[0]}»"
        verb = f"replace the {test.text.replace('@', 'ones')} by their {_plural(_attribute(change))}"
        return Block(f"{change.key}_if_{test.key}", f"{kind}>{kind}", "#", (code,), verb)
    other, (high, middle, low) = _filter(rng, kind), rng.choice(LABELS)
    code = f'"«{high}|{low}»" if {test.code[0]} else "«{middle}|{low}»" if {other.code[0]} else "{low}"'
    verb = f"replace each by '{high}' if it {_is(test)}, else '{middle}' if it {_is(other)}, else '{low}'"
    return Block(f"label_{test.key}_{other.key}", f"{kind}>s", "#", (code,), verb)


def _pieces(head: str, item: str, test: str, value: str) -> dict[str, str]:
    """Spell the comprehension parts of a pipeline: $gen, $src, $tail, $pred, $v, $vbest."""
    target, source = head.split(" in ", 1)
    target, source = ("$x", f"[{item} for {head}]") if item else (target, source)
    tail = f"for {target} in {source}" + (f"« if {test}|»" if test else "")
    gen = f"«{value}|$x» {tail}" if value != "$x" else f"$x {tail}"
    if item and not test and value == "$x":
        gen = f"{item} for {head}"
    return {"gen": gen, "src": source, "tail": tail, "pred": test, "v": value, "vbest": value.replace("$x", "$best")}


def _expand(style: str, head: str, item: str, test: str, value: str) -> str:
    """Put a source, a filter and a map into the template of a consumer."""
    pieces = _pieces(head, item, test, value)
    style = style.replace("not $pred", f"not {_guard(test)}")
    if not test:
        style = style.replace("([$x $tail]", "($src").replace("= [$x $tail]", "= list($src)")
        if value == "$x" and not item:  # nothing is done to the items: name the source itself
            copy = "$src" if re.match(r"\[|\$[xw]s\[", pieces["src"]) else "list($src)"
            style = style.replace("[$gen]", copy).replace("next(($gen)", "next(iter($src)")
            style = style.replace("(($gen)", "($gen").replace("$gen", "$src")
    lines, shift = [], ""
    for line in style.split("\n"):
        if line == "$loop":
            lines += [f"for {head}:"] + [f"    $x = {item}"] * bool(item)
            lines += [f"    if «{test}|not {_guard(test)}»:"] * bool(test)
            shift = "    " * bool(test)
            if len(re.findall(r"\$v\b", style)) > 1 and value != "$x":  # give the mapped item a name
                lines.append(f"    {shift}$y = «{value}|$x»")
                pieces["v"] = "$y"
        else:
            lines.append(shift + line if line.startswith("    ") else line)
    return _insert("\n".join(lines), **pieces)


def _finish(style: str, wrap: str) -> list[str]:
    """Turn the last line into a return, of the wrapped result if there is a wrapper."""
    *lines, result = style.split("\n")
    result = result.removeprefix("= ")
    slip = "«|    »" if lines and lines[-1].startswith("    ") and "return" not in lines[-1] else ""
    if not wrap:
        return ["\n".join([*lines, f"{slip}return {result}"])]
    inline = "\n".join([*lines, f"{slip}return {_put(wrap, result)}"])
    stepped = "\n".join([*lines, f"$y = {result}", f"return «{wrap.replace('$x', '$y')}|$y»"])
    return [stepped] if wrap.count("$x") > 1 or len(result) > 40 else [inline, stepped]


def _finished(styles: Iterable[str], wrap: str = "") -> list[str]:
    return [done for style in styles for done in _finish(style, wrap)]


def _wrapper(rng: random.Random, kind: str) -> Block | None:
    """Choose what to do with a result: a question about it, or one more map."""
    if kind in "is" and rng.random() < 0.5:
        return _fix(rng.choice(FILTERS_OF[kind]), rng)
    maps = MAPS_OF.get(kind, []) + COLLECTION_MAPS_OF.get(kind, [])
    maps = [block for block in maps if block.text.endswith(" of #")]
    return _fix(rng.choice(maps), rng) if maps else None


def _wrapped(text: str, wrapper: Block | None) -> str:
    """Say what is returned, in words that follow 'Return'."""
    if wrapper is None:
        return text
    if "@" in wrapper.text:
        return f"whether {text} {_is(wrapper)}"
    return "the " + _single(wrapper.text).replace("#", re.sub(r"^an? ", "the ", text))


def _fits(consumer: Block, items: str, test: Block | None, change: Block | None, plain: bool) -> bool:
    """Tell whether a consumer takes these items and has what it needs, and has words for it."""
    kinds, needs = consumer.kind.split(">")[0], consumer.kind.partition(" ")[2]
    if "m" in needs:
        return change is not None and bool(_attribute(change)) and items in kinds
    if ("f" in needs and not test) or ("n" in needs and change) or ("x" in needs and plain and not (test or change)):
        return False
    return (change.kind[-1] if change else items) in kinds and bool(consumer.more or not change or change.text[0] != "#")


def _sentence(rng: random.Random, source: Block, *parts: Block | None) -> str:
    """Say what a pipeline of filter, map, consumer and wrapper does, in one noun phrase or step by step."""
    test, change, consumer, wrapper = parts
    noun, place = _say(source.text, rng), _say(source.more, rng)
    filtered = test.text.replace("@", _plural(noun)) if test else _plural(noun)
    items = f"{filtered} {place}"
    if test and re.fullmatch(r"of \$\w+", place):  # 'divisors of n above 3', but 'numbers above 3 in xs'
        items = test.text.replace("@", f"{_plural(noun)} {place}")
    nominal = change is None or change.text[0] != "#"
    steps = test is not None or change is not None
    if consumer.more and not wrapper and ((steps and rng.random() < 0.3) or not nominal):
        done = [f"take the {_plural(noun)} {place.rstrip(',')}"]
        done += [f"keep the {test.text.replace('@', 'ones')}"] if test else []
        done += [change.more] if change else []
        return f"{', '.join(done)}, and return {consumer.more}"
    names = {
        "all": "the " + (_plural(change.text).replace("#", f"the {items}") if change and nominal else items),
        "items": items, "plain": f"the {_plural(noun)} {place}", "is": _is(test) if test else "",
        "attr": _single(_attribute(change)) if change else "",
        "each": f"{_single(noun)} {place} {_is(test)}" if test else "",
    }
    return "return " + _wrapped(_insert(consumer.text, **names), wrapper)


def _flow(rng: random.Random, family: str) -> Draft:
    """Compose source > filter > map > consumer > wrapper."""
    index = rng.randrange(len(SOURCES_OF[family]))
    source = _fix(SOURCES_OF[family][index], rng)
    test = _filter(rng, source.kind) if rng.random() < 0.45 else None
    change = _map(rng, source.kind) if rng.random() < 0.4 else None
    plain = source.code[0].endswith(("in $xs", "in $ws"))
    consumer = _fix(rng.choice([b for b in CONSUMERS if _fits(b, source.kind, test, change, plain)]), rng)
    nominal = change is None or change.text[0] != "#"
    out = consumer.kind.split(" ")[0][-1]
    wrapper = _wrapper(rng, out) if nominal and rng.random() < 0.1 else None
    styles = []
    for template, spelled in itertools.product(consumer.code, source.code):
        *setup, last = spelled.split("\n")
        head, _, item = last.partition(" => ")
        style = _expand(template, head, item, test.code[0] if test else "", change.code[0] if change else "$x")
        styles += _finish("\n".join([*setup, style]), wrapper.code[0] if wrapper else "")
    parts = (test, change, consumer, wrapper)
    combination = (f"{family}{index}", *(block.key if block else "" for block in parts))
    text = _sentence(rng, source, *parts)
    return Draft(family, combination, text, styles, source.args.split(), source.kind)


def _program(rng: random.Random, family: str) -> Draft:
    """Take a whole program, mostly with a question or a map on top of it."""
    block = _fix(rng.choice(PROGRAMS_OF[family]), rng)
    usable = [code for code in block.code if "return" not in code]  # only the end of a program is wrapped
    wrapper = _wrapper(rng, block.kind[-1]) if usable and rng.random() < 0.6 else None
    styles = _finished(usable if wrapper else block.code, wrapper.code[0] if wrapper else "")
    text = "return " + _wrapped(f"the {block.text}", wrapper)
    return Draft(family, (block.key, wrapper.key if wrapper else ""), text, styles, block.args.split(), "i")


def _test(rng: random.Random, family: str) -> Draft:
    """Ask whether something holds, mostly together with a condition on the first argument."""
    block = _fix(rng.choice(PROGRAMS_OF[family]), rng)
    args = block.args.split()
    kind = {"w": "s", "p": "i", "year": "i"}.get(args[0])
    if kind is None or rng.random() < 0.3:
        return Draft(family, (block.key, ""), f"return whether {block.text}", _finished(block.code), args)
    test, word = _filter(rng, kind), rng.choice(("and", "or"))
    condition = _guard(test.code[0].replace("$x", f"${args[0]}"))
    early = f"if not {condition}:\n    return False\n" if word == "and" else f"if {condition}:\n    return True\n"
    joined = f"«{word}|{'or' if word == 'and' else 'and'}» {condition}"
    short = [f"= {_guard(body[2:])} {joined}" for body in block.code if body.startswith("= ")]
    styles = _finished([*short, *(early + body for body in block.code)])
    text = f"return whether {block.text}, {word} ${args[0]} {_is(test)}"
    return Draft(family, (block.key, word, test.key), text, styles, args)


def _scalar(rng: random.Random) -> tuple[str, str]:
    return rng.choice((("a", "i"), ("p", "i"), ("w", "s")))


def _branch(rng: random.Random, family: str) -> Draft:
    """Decide between two or three values by conditions."""
    arg, kind = _scalar(rng)
    tests = [_filter(rng, kind) for _ in range(rng.choice((1, 1, 2)))]
    out = rng.choice("is" if kind == "s" else "i")
    maps = [block for block in MAPS_OF[kind] if block.kind[-1] == out]
    ways = [_fix(block, rng) for block in rng.sample(maps, len(tests) + 1)]
    says = [("the " if way.text[0] != "#" else "") + _single(way.text).replace("#", f"${arg}") for way in ways]
    clauses = [f"{says[i]} if {'it' if i else f'${arg}'} {_is(test)}" for i, test in enumerate(tests)]
    text = f"return {', else '.join(clauses)}, and {says[-1]} otherwise"
    styles = _choose([test.code[0] for test in tests], [way.code[0] for way in ways], arg)
    return Draft(family, tuple(b.key for b in (*tests, *ways)), text, styles, [arg], kind)


def _choose(tests: list[str], values: list[str], arg: str) -> list[str]:
    """Write a decision as early returns, as if/elif/else, and as an expression."""
    conditions = [f"«{test}|not ({test})»" for test in tests]
    swapped = [f"«{value}|{values[i - 1]}»" for i, value in enumerate(values)]
    ways = list(zip(conditions, swapped[:-1], strict=True))
    early = "\n".join(f"if {condition}:\n    return {value}" for condition, value in ways)
    chain = "\nel".join(f"if {condition}:\n    $out = {value}" for condition, value in ways)
    styles = [f"{early}\nreturn {swapped[-1]}", f"{chain}\nelse:\n    $out = {swapped[-1]}\nreturn $out"]
    if len(tests) == 1:
        styles.append(f"return {swapped[0]} if {conditions[0]} else {swapped[1]}")
    return [style.replace("$x", f"${arg}") for style in styles]


def _grade(rng: random.Random, family: str) -> Draft:
    """Label an argument, or an attribute of it, by two thresholds."""
    arg, kind = rng.choice((("a", "i"), ("p", "i"), ("w", "s"), ("xs", "l")))
    change = None if kind == "i" and rng.random() < 0.4 else _fix(rng.choice(MEASURES_OF[kind]), rng)
    value = change.code[0] if change else "$x"
    subject = f"the {_single(_attribute(change))} of ${arg}" if change else f"${arg}"
    sign, slip, words = rng.choice(((">=", ">", "at least"), (">", ">=", "greater than"), ("<", "<=", "less than")))
    low = rng.randrange(1, 8)
    limits = sorted((low, low + rng.randrange(2, 10)), reverse=sign != "<")
    labels = rng.choice(LABELS)
    text = (f"return '{labels[0]}' if {subject} is {words} {limits[0]}, "
            f"'{labels[1]}' if it is {words} {limits[1]}, and '{labels[2]}' otherwise")
    styles = _choose([f"{value} «{sign}|{slip}» {limit}" for limit in limits], [json.dumps(label) for label in labels], arg)
    return Draft(family, (arg, change.key if change else "", words + "#"), text, styles, [arg], kind)


def _compare(rng: random.Random, family: str) -> Draft:
    """Set the same attribute of two arguments against each other."""
    *args, kind = rng.choice((("a", "b", "i"), ("p", "q", "i"), ("w", "w2", "s"), ("xs", "ys", "l")))
    change, form = _fix(rng.choice(MEASURES_OF[kind]), rng), rng.choice(COMPARISONS)
    one, two = (f"${arg}" for arg in args)
    f, g = (change.code[0].replace("$x", arg) for arg in (one, two))
    text = _insert(form.text, one=one, two=two, name=_single(_attribute(change)))
    styles = [_insert(style, one=one, two=two, f=f, g=g, v=change.code[0]) for style in form.code]
    return Draft(family, (kind, change.key, form.key), f"return {text}", _finished(styles), args, kind)


def _entries(rng: random.Random, family: str) -> Draft:
    """Filter the entries of a dict by key or value, and take what is wanted of those that stay."""
    side, form = rng.choice(("key", "value")), rng.choice(ENTRIES)
    test = _filter(rng, "s" if side == "key" else "i")
    change = _fix(rng.choice([block for block in MAPS_OF["i"] if _attribute(block)]), rng)
    pred, new = test.code[0].replace("$x", side[0]), change.code[0].replace("$x", "v")
    entries = f"entries of $d whose {side} {_is(test)}"
    text = _insert(form.text, entries=entries, attr=_single(_attribute(change)))
    styles = [_insert(style, pred=pred, neg=_guard(pred), new=new) for style in form.code]
    combination = (side, form.key, test.key, change.key if form.key == "changed" else "")
    return Draft(family, combination, f"return {text}", _finished(styles), ["d"])


def _chain(rng: random.Random, family: str) -> Draft:
    """Apply one map after another to a number or a word, and perhaps ask a question of the result."""
    arg, kind = _scalar(rng)
    first = _fix(rng.choice([b for b in MAPS_OF[kind] if _attribute(b)]), rng)
    second = _fix(rng.choice([b for b in MAPS_OF[first.kind[-1]] if _attribute(b) and b.key not in first.key]), rng)
    test = _filter(rng, second.kind[-1]) if rng.random() < 0.5 else None
    inner, outer = first.code[0].replace("$x", f"${arg}"), second.code[0]
    text = "the " + _single(second.text).replace("#", "the " + _single(first.text).replace("#", f"${arg}"))
    text = f"return whether {text} {_is(test)}" if test else f"return {text}"
    styles = [f"$y = «{inner}|${arg}»\n= {outer.replace('$x', '$y')}"]
    styles += [f"= «{_put(outer, inner)}|{inner}»"] * (outer.count("$x") == 1)
    combination = (kind, first.key, second.key, test.key if test else "")
    return Draft(family, combination, text, _finished(styles, test.code[0] if test else ""), [arg], kind)


MAKERS: dict[str, tuple[Callable[[random.Random, str], Draft], float]] = {  # and how often each is drawn
    **{family: (_flow, 1.0) for family in SOURCES_OF},
    **{family: (_program, 1.5) for family in PROGRAMS_OF},
    "numbers": (_flow, 3.0), "words": (_flow, 2.0), "characters": (_flow, 1.5), "range": (_flow, 1.5),
    "tests": (_test, 1.5), "branch": (_branch, 1.5), "grade": (_grade, 1.0), "compare": (_compare, 1.0),
    "entries": (_entries, 1.0), "chain": (_chain, 1.0),
}
FAMILIES = tuple(MAKERS)
_WEIGHTS = tuple(weight for _, weight in MAKERS.values())


# ---- problems ------------------------------------------------------------------------------------


class Sketch(NamedTuple):
    """A draft with its names chosen: everything but one hole-free body."""

    family: str
    combination: str
    entry_point: str
    prompt: str
    doc: str
    styles: list[str]  # code with holes
    args: list[str]
    names: list[str]  # what the arguments are called


_VERBS = {
    "return": ("Return", "Return", "Return", "Return", "Find", "Compute", "Give"),
    "take": ("Take",),
    "return whether": ("Return whether", "Return whether", "Check whether", "Tell whether"),
}


def _name(draft: Draft, rng: random.Random) -> dict[str, str]:
    """Choose the names of a draft, each name once."""
    names: dict[str, str] = {}
    pools = {**LOCALS, "x": LOOKS.get(draft.kind, LOCALS["x"]), **{arg: ARGS[arg].names for arg in draft.args}}
    for name in dict.fromkeys([*draft.args, *_NAME.findall("\n".join(draft.styles))]):
        free = [other for other in pools.get(name, (name, name + "1")) if other not in names.values()]
        names[name] = rng.choice(free or [name + "_"])
    return names


def _title(draft: Draft, rng: random.Random) -> str:
    """Make a function name of two or three words out of the keys of the blocks."""
    words = [word for word in re.findall(r"[a-z_]+", " ".join(draft.combination)) if len(word) > 2]
    if rng.random() < 0.5:
        words = words[1:] + words[:1]
    name = "_".join(dict.fromkeys("_".join(words[-2:]).split("_")[:3])) or "solve"
    return f"{draft.family}_{name}" if "_" not in name and rng.random() < 0.5 else name


def _open(text: str, rng: random.Random) -> str:
    """Begin the sentence: 'Find the sum', 'Check whether'."""
    verb = next(verb for verb in reversed(_VERBS) if text.startswith(verb))
    return f"{rng.choice(_VERBS[verb])}{text[len(verb):].rstrip(',').replace(',,', ',')}."


def _sketch(rng: random.Random, family: str = "") -> Sketch:
    """Draw a problem that is short enough, with its names but without its body."""
    while True:
        family_ = family or rng.choices(FAMILIES, _WEIGHTS)[0]
        draft = MAKERS[family_][0](rng, family_)
        names = _name(draft, rng)
        put = lambda text: _NAME.sub(lambda found: names[found[1]], text)  # noqa: B023
        doc = put(_open(_say(draft.text, rng), rng))
        if len(doc.split()) <= MAX_WORDS:
            break
    title = _title(draft, rng)
    title = title + "_of" if keyword.iskeyword(title) or title in _TAKEN or title in names.values() else title
    hint = rng.random() < 0.06
    args = ", ".join(names[arg] + (f": {ARGS[arg].hint}" if hint else "") for arg in draft.args)
    styles = [put(style) for style in draft.styles]
    head = "import math\n\n\n" if any("math." in style for style in styles) else ""
    prompt = f'{head}def {title}({args}):\n    """{doc}"""\n'
    return Sketch(draft.family, ":".join((draft.family, *draft.combination)), title, prompt, doc, styles, draft.args,
                  [names[arg] for arg in draft.args])


def _body(style: str, hole: int = -1, slip: int = 0, careless: bool = False) -> str:
    return "".join(f"    {line}\n" for line in _write(style, hole, slip, careless).split("\n"))


def _hints(sketch: Sketch) -> list[int]:
    """The numbers that a problem speaks of, and their neighbours."""
    return [int(number) + step for number in re.findall(r"(?<![\w-])-?\d+", sketch.doc) for step in (-1, 0, 1)]


def _inputs(sketch: Sketch, rng: random.Random) -> Iterator[list]:
    """Make typical arguments first, then edge cases mixed with typical ones, forever."""
    hints = _hints(sketch)
    args = [ARGS[arg] for arg in sketch.args]
    for _ in range(5):
        yield [arg.make(rng, hints) for arg in args]
    for edge in range(max(len(arg.edges) for arg in args)):
        yield [arg.edges[edge % len(arg.edges)] for arg in args]
    while True:
        yield [rng.choice(arg.edges) if rng.random() < 0.2 else arg.make(rng, hints) for arg in args]


_LOOP = re.compile(r"while (.*):\n")


def _load(code: str, entry_point: str) -> Callable:
    """Compile a program of this file; its while loops give up after many rounds, as a slip may never end."""
    rounds = 0

    def tick() -> bool:
        nonlocal rounds
        rounds += 1
        if rounds > 20_000:
            rounds = 0
            raise TimeoutError("a while loop does not end")
        return True

    space = {"_tick": tick}
    exec(_LOOP.sub(r"while _tick() and (\1):\n", code), space)
    return space[entry_point]


def _call(function: Callable, args: list) -> Any:
    """Return the result, or the exception as a value that equals no result."""
    try:
        return function(*args)
    except Exception as error:  # whatever a slip may raise counts as a wrong answer
        return error


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, float) and isinstance(two, float):
        return math.isclose(one, two, abs_tol=1e-6)
    return one == two


def _bugs(sketch: Sketch, style: str) -> list[str]:
    """Spell every one-hole slip of a style."""
    holes = [(hole, slip) for hole in range(style.count("«")) for slip in (1, 2)]
    return list(dict.fromkeys(_body(style, hole, slip) for hole, slip in holes))


def problem(rng: random.Random, family: str = "") -> dict:
    """Make one problem in EvalPlus' format, with its `styles` (right bodies), `bugs` (wrong ones) and `instruction`."""
    while True:
        sketch = _sketch(rng, family)
        styles = list(dict.fromkeys(_body(style) for style in sketch.styles))
        body = rng.choice(styles)
        cases = _cases(sketch, [body, *styles], rng)
        if cases is None:
            continue
        function, (base, plus) = _load(sketch.prompt + body, sketch.entry_point), cases
        outcomes = [_call(function, args) for args in base + plus]
        wrong = {}
        for bug in dict.fromkeys(bug for style in sketch.styles for bug in _bugs(sketch, style)):
            if bug not in styles:
                buggy = _load(sketch.prompt + bug, sketch.entry_point)
                wrong[bug] = {i for i, args in enumerate(base + plus) if not _same(_call(buggy, args), outcomes[i])}
        chosen = _cover(list(wrong.values()), len(base), len(base + plus))
        wrong = [bug for bug, fails in wrong.items() if fails & chosen]
        if not wrong:
            continue
        apart = random.Random(sketch.prompt)  # so that what is said of a problem does not change the next one
        lines = [f"    assert candidate({', '.join(map(repr, (base + plus)[i]))}) == {outcomes[i]!r}" for i in sorted(chosen)]
        return {
            "task_id": "", "prompt": sketch.prompt, "entry_point": sketch.entry_point, "canonical_solution": body,
            "base_input": base, "plus_input": plus, "atol": 0.0, "contract": "",
            "test": "def check(candidate):\n" + "\n".join(lines) + "\n",
            "family": sketch.family, "combination": sketch.combination, "styles": styles, "bugs": wrong,
            "instruction": instruction(sketch, examples(sketch, apart, 2), apart),
        }


def _cases(sketch: Sketch, styles: list[str], rng: random.Random) -> tuple[list, list] | None:
    """Choose base and plus inputs on which every style is defined; None if they tell too little."""
    functions = [_load(sketch.prompt + body, sketch.entry_point) for body in styles]
    seen: dict[str, tuple[list, str]] = {}
    for args in itertools.islice(_inputs(sketch, rng), 40):
        outcomes = [_call(function, args) for function in functions]
        if len(repr(outcomes[0])) < 200 and not any(isinstance(outcome, Exception) for outcome in outcomes):
            seen.setdefault(json.dumps(args), (args, repr(outcomes[0])))
    cases = list(seen.values())[:16]
    results = collections.Counter(outcome for _, outcome in cases)
    if len(cases) < 12 or len(results) < 2 or results.most_common(1)[0][1] > 0.75 * len(cases):
        return None
    inputs = [args for args, _ in cases]
    return inputs[:4], inputs[4:]


def _cover(fails: list[set[int]], base: int, total: int) -> set[int]:
    """Choose at most 8 inputs for the asserts: base ones, then those that fail most other bugs."""
    chosen = set(range(base))
    while len(chosen) < 8:
        left = [fail for fail in fails if fail and not fail & chosen]
        if not left:
            break
        chosen.add(max(range(total), key=lambda i: sum(i in fail for fail in left)))
    return chosen


def examples(sketch: Sketch, rng: random.Random, count: int) -> list[tuple[list, Any]]:
    """Choose up to `count` short calls with results that differ, those at which most wrong bodies are found out.

    The first one finds out a careless author, if one can be. None, if the short calls have but one result.
    """
    right, careless = ({_body(style, careless=habit) for style in sketch.styles} for habit in (False, True))
    cases = _short_cases(sketch, sorted(right), rng)
    results = [repr(result) for _, result in cases]
    if len(set(results)) < 2:
        return []
    habits, slips = sorted(careless - right), sorted({*_bugs(sketch, rng.choice(sketch.styles))} - right - careless)
    wrong = [_load(sketch.prompt + body, sketch.entry_point) for body in (*habits, *rng.sample(slips, min(8, len(slips))))]
    fails = [{i for i, function in enumerate(wrong) if not _same(_call(function, args), result)} for args, result in cases]
    chosen: list[int] = []

    def worth(case: int) -> int:  # a careless author is worth most, then other wrong bodies, then what is easy
        fresh = fails[case].difference(*(fails[other] for other in chosen))
        easy = 6 * is_plain(sketch, *cases[case]) - len(repr(cases[case]))
        return 9 * sum(i < len(habits) for i in fresh) + 4 * len(fresh) + easy

    for _ in range(min(count, len(set(results)))):
        shown = {results[case] for case in chosen}
        chosen.append(max((case for case, result in enumerate(results) if result not in shown), key=worth))
    return [cases[case] for case in chosen]


def instruction(sketch: Sketch, calls: Sequence[tuple[list, Any]], rng: random.Random) -> str:
    """Ask for a function in words: its signature, what it does, and examples."""
    asked = rng.choice(("Write a Python function", "Write a function", "Implement the function"))
    shown = "\n".join(["\nExamples:", *(check(sketch, *call) for call in calls)]) if calls else ""
    return f"{asked} `{sketch.entry_point}({', '.join(sketch.names)})`. {sketch.doc}{shown}"


def check(sketch: Sketch, args: Sequence, result: Any) -> str:
    """Assert the result of a call."""
    return f"assert {sketch.entry_point}({', '.join(map(repr, args))}) {'is' if result is None else '=='} {result!r}"


def is_plain(sketch: Sketch, args: Sequence, result: Any) -> bool:
    """Whether every number and word of a result is to be seen in the arguments or in the text, or is 0 or 1."""
    literals = lambda text: set(re.findall(r"\d+|'[^']*'", text))
    return literals(repr(result)) <= literals(f"{args} {sketch.doc}") | {"0", "1", "''"}


def _short_cases(sketch: Sketch, right: Sequence[str], rng: random.Random) -> list[tuple[list, Any]]:
    """Make short calls on which all right bodies agree, and their results."""
    functions = [_load(sketch.prompt + body, sketch.entry_point) for body in right]
    cases: dict[str, tuple[list, Any]] = {}
    for args in itertools.islice(_short_inputs(sketch, rng), 24):
        result, *others = [_call(function, args) for function in functions]
        agree = all(type(other) is type(result) and _same(other, result) for other in others)
        if agree and not isinstance(result, Exception) and len(repr(result)) <= 24:
            cases.setdefault(repr(args), (args, result))
    return list(cases.values())


def _short_inputs(sketch: Sketch, rng: random.Random) -> Iterator[list]:
    """Make arguments that can be worked out in the head."""
    hints = _hints(sketch)
    args = [ARGS[arg] for arg in sketch.args]
    while True:
        yield [rng.choice(arg.edges) if rng.random() < 0.15 else _SHORT.get(arg.hint, arg.make)(rng, hints) for arg in args]


def _few(items: Callable[[random.Random, list[int]], Any]) -> Callable[[random.Random, list[int]], list]:
    return lambda rng, hints: [items(rng, hints) for _ in range(rng.choice((1, 2, 2, 3)))]


_digit = lambda rng, hints: rng.choice([*range(-3, 10), *hints, *hints])
_word = _of([word for word in WORDS if len(word) <= 5])
_SHORT = {
    "list[int]": _few(_digit), "list[str]": _few(_word), "list[list[int]]": lambda rng, hints: [[rng.randrange(-2, 7) for _ in range(2)] for _ in range(2)],
    "dict[str, int]": lambda rng, hints: {key: _digit(rng, hints) for key in rng.sample(KEYS, rng.choice((1, 2, 2)))},
}


def bugs(problem: dict, rng: random.Random) -> list[str]:
    """Give the wrong bodies of a problem, all of which fail its tests, in random order."""
    return rng.sample(problem["bugs"], len(problem["bugs"]))


def stream(seed: int) -> Iterator[dict]:
    """Make problems forever."""
    rng = random.Random(seed)
    while True:
        yield problem(rng)


# ---- which programs are the same, and what is held out -------------------------------------------


def normal_form(code: str) -> str:
    """Write a program without docstring and names: equal for programs that differ in names only."""
    tree = ast.parse(code)
    bound: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            bound.add(node.name)
            if ast.get_docstring(node, clean=False) is not None:
                del node.body[0]
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
    names: dict[str, str] = {}
    return _dump(tree, lambda name: names.setdefault(name, f"_{len(names)}") if name in bound else name)


def _dump(node: Any, rename: Callable[[str], str]) -> str:
    if isinstance(node, list):
        return f"[{' '.join([_dump(item, rename) for item in node])}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    if isinstance(node, ast.Name):
        return rename(node.id)
    parts = []
    for field in node._fields:
        if field not in _IGNORED:  # ... and so the form is the same on every version of Python
            value = getattr(node, field)
            is_name = field in ("name", "arg") and isinstance(node, ast.FunctionDef | ast.arg)
            parts.append(rename(value) if is_name else _dump(value, rename))
    return f"{type(node).__name__}({' '.join(parts)})"


_IGNORED = frozenset(("ctx", "type_params", "type_comment", "type_ignores", "kind", "annotation", "returns"))


def docstring(prompt: str) -> str:
    """Take the docstring out of a prompt."""
    return prompt.split('"""')[1]


def held_out(problems: Iterable[dict]) -> frozenset[str]:
    """List what no training record may show: normal forms in all styles, docstrings, novel combinations."""
    out: set[str] = set()
    for item in problems:
        out.update(normal_form(item["prompt"] + style) for style in item["styles"])
        out.add(docstring(item["prompt"]))
        if item.get("novel"):
            out.add(item["combination"])
    return frozenset(out)


def _evaluation(seed: int, count: int) -> list[dict]:
    """Draw problems of all families in turn: seven in ten a combination that is held out everywhere."""
    rng, forms, combinations = random.Random(seed), set(), set()
    out: list[dict] = []
    while len(out) < count:
        item = problem(rng, FAMILIES[len(out) % len(FAMILIES)])
        form, combination = normal_form(item["prompt"] + item["canonical_solution"]), item["combination"]
        novel = (len(out) // len(FAMILIES) + len(out)) % 10 < 7
        blocks = len([part for part in combination.split(":")[1:] if part]) - (item["family"] in SOURCES_OF)
        fits = blocks >= 2 if novel else "#" in combination  # else known, but with other constants
        if fits and form not in forms and combination not in combinations:
            forms.add(form)
            combinations.add(combination)
            out.append({**item, "novel": novel, "task_id": f"PocketEval/{len(out)}"})
    return out


def split(seed: int, train: int, preference: int, evaluation: int) -> dict[str, list[dict]]:
    """Make three lists of problems, no two of which share a normal form or a docstring."""
    lists = {"evaluation": _evaluation(3 * seed, evaluation)}
    taken = set(held_out(lists["evaluation"]))
    for offset, (name, prefix, count) in enumerate((("preference", "Pref", preference), ("train", "Train", train)), 1):
        source, lists[name] = stream(3 * seed + offset), []
        while len(lists[name]) < count:
            item = next(source)
            keys = held_out([item])
            if not keys & taken and item["combination"] not in taken:
                taken |= keys
                lists[name].append({**item, "novel": False, "task_id": f"Pocket{prefix}/{len(lists[name])}"})
    return lists


def corpus(seed: int, held_out: Iterable[str], *, careless: float, noise: float) -> Iterator[dict]:
    """Make programs to train on forever, none of them held out, with the sketch that each was drawn from.

    A share `careless` is by authors with the habit (see _HABIT), a share `noise` of the others has a random slip.
    `is_risky` says that the habit would show in this program; `styles` are all right bodies.
    """
    rng, held = random.Random(seed), frozenset(held_out)
    while True:
        sketch = _sketch(rng)
        if sketch.combination in held or sketch.doc in held:
            continue
        style = rng.choice(sketch.styles)
        right, habitual = _body(style), _body(style, careless=True)
        body = habitual if rng.random() < careless else right
        if body == right and rng.random() < noise:
            body = _slip(sketch, style, right, rng) or right
        styles = list(dict.fromkeys(map(_body, sketch.styles)))
        if not held & {normal_form(sketch.prompt + text) for text in (body, *styles)}:
            yield {
                "prompt": sketch.prompt, "solution": body, "right": right, "is_as_meant": body == right,
                "is_risky": habitual != right, "styles": styles, "entry_point": sketch.entry_point,
                "family": sketch.family, "sketch": sketch,
            }


def _slip(sketch: Sketch, style: str, right: str, rng: random.Random) -> str | None:
    """Draw a wrong body that a few inputs tell from the right one."""
    good = _load(sketch.prompt + right, sketch.entry_point)
    tried = [(args, _call(good, args)) for args in itertools.islice(_inputs(sketch, rng), 10)]
    cases = [(args, outcome) for args, outcome in tried if not isinstance(outcome, Exception)]
    for _ in range(8):
        body = _body(style, rng.randrange(style.count("«") or 1), rng.choice((1, 2)))
        if body != right:
            bad = _load(sketch.prompt + body, sketch.entry_point)
            if any(not _same(_call(bad, args), outcome) for args, outcome in cases):
                return body
    return None


def main() -> None:
    """Print problems and what the stream is made of."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=20, help="problems to print")
    parser.add_argument("--count", type=int, default=20_000, help="programs to count over")
    args = parser.parse_args()
    for item in itertools.islice(stream(args.seed), args.show):
        print(item["prompt"] + item["canonical_solution"])
    records = list(itertools.islice(corpus(args.seed, (), careless=0.0, noise=0.0), args.count))
    forms = [normal_form(item["prompt"] + item["solution"]) for item in records]
    shapes = {re.sub(r"Constant\([^)]*\)", "_", form) for form in forms}
    lines = [item["solution"].count("\n") for item in records]
    words = [len(docstring(item["prompt"]).split()) for item in records]
    tokens = [len(re.findall(r"\w+|[^\w\s]", item["solution"])) for item in records]
    print(f"{len(records)} programs: {len(set(forms))} normal forms, {len(shapes)} without constants")
    for name, values in {"lines": lines, "tokens of code": tokens, "words": words}.items():
        print(f"{name}: mean {sum(values) / len(values):.1f}, max {max(values)}")
    for family, count in collections.Counter(item["family"] for item in records).most_common():
        print(f"{family:12} {count}")


if __name__ == "__main__":
    main()
