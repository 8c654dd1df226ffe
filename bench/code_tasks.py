"""Small functions for a model to write: a request, a solution, and assertions that hold for every right one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Task:
    request: str
    solution: str
    checks: str


def _task(what: str, solution: str, checks: str) -> Task:
    return Task(f"Write a Python function {what} Answer with the code of the function only.", solution, checks)


TASKS = (
    _task(
        "`clamp(x, low, high)` that returns x limited to the range from low to high.",
        "def clamp(x, low, high):\n    return max(low, min(high, x))\n",
        "assert clamp(5, 0, 3) == 3\nassert clamp(-1, 0, 3) == 0\nassert clamp(2, 0, 3) == 2",
    ),
    _task(
        "`count_vowels(text)` that returns how many of the letters a, e, i, o, u a text has, in upper and lower case.",
        "def count_vowels(text):\n    return sum(c in 'aeiou' for c in text.lower())\n",
        "assert count_vowels('Education') == 5\nassert count_vowels('') == 0\nassert count_vowels('XYZ') == 0",
    ),
    _task(
        "`is_palindrome(text)` that says whether a text reads the same backwards, without regard to case, spaces and "
        "punctuation.",
        "def is_palindrome(text):\n    letters = [c.lower() for c in text if c.isalnum()]\n"
        "    return letters == letters[::-1]\n",
        "assert is_palindrome('A man, a plan, a canal: Panama')\nassert not is_palindrome('ab')\nassert is_palindrome('')",
    ),
    _task(
        "`fibonacci(n)` that returns a list of the first n Fibonacci numbers, beginning with 0 and 1.",
        "def fibonacci(n):\n    out = []\n    a, b = 0, 1\n    for _ in range(n):\n        out.append(a)\n"
        "        a, b = b, a + b\n    return out\n",
        "assert fibonacci(0) == []\nassert fibonacci(1) == [0]\nassert fibonacci(7) == [0, 1, 1, 2, 3, 5, 8]",
    ),
    _task(
        "`primes(n)` that returns the list of all prime numbers up to n, n included.",
        "def primes(n):\n    return [p for p in range(2, n + 1) if all(p % d for d in range(2, int(p ** 0.5) + 1))]\n",
        "assert primes(1) == []\nassert primes(2) == [2]\nassert primes(30) == [2, 3, 5, 7, 11, 13, 17, 19, 23, 29]",
    ),
    _task(
        "`word_counts(text)` that returns a dictionary from each word of a text, in lower case, to how often it occurs. Words "
        "are separated by whitespace.",
        "def word_counts(text):\n    counts = {}\n    for word in text.lower().split():\n"
        "        counts[word] = counts.get(word, 0) + 1\n    return counts\n",
        "assert word_counts('A b a') == {'a': 2, 'b': 1}\nassert word_counts('') == {}",
    ),
    _task(
        "`flatten(items)` that returns a flat list of all elements of a list that may contain lists in any depth.",
        "def flatten(items):\n    out = []\n    for item in items:\n        if isinstance(item, list):\n"
        "            out.extend(flatten(item))\n        else:\n            out.append(item)\n    return out\n",
        "assert flatten([1, [2, [3, []], 4]]) == [1, 2, 3, 4]\nassert flatten([]) == []",
    ),
    _task(
        "`gcd(a, b)` that returns the greatest common divisor of two positive integers, without importing anything.",
        "def gcd(a, b):\n    while b:\n        a, b = b, a % b\n    return a\n",
        "assert gcd(12, 18) == 6\nassert gcd(7, 5) == 1\nassert gcd(10, 10) == 10",
    ),
    _task(
        "`binary_search(items, wanted)` that returns the index of a value in a sorted list, or -1 if it is not there.",
        "def binary_search(items, wanted):\n    low, high = 0, len(items) - 1\n    while low <= high:\n"
        "        middle = (low + high) // 2\n        if items[middle] == wanted:\n            return middle\n"
        "        if items[middle] < wanted:\n            low = middle + 1\n        else:\n            high = middle - 1\n"
        "    return -1\n",
        "items = [1, 3, 5, 8, 13]\nassert [binary_search(items, x) for x in items] == [0, 1, 2, 3, 4]\n"
        "assert binary_search(items, 4) == -1\nassert binary_search([], 1) == -1",
    ),
    _task(
        "`caesar(text, shift)` that shifts every letter from a to z and from A to Z by so many places in the alphabet, around "
        "its end, and leaves other characters as they are.",
        "def caesar(text, shift):\n    out = ''\n    for c in text:\n        if c.isascii() and c.isalpha():\n"
        "            base = ord('a') if c.islower() else ord('A')\n"
        "            out += chr((ord(c) - base + shift) % 26 + base)\n        else:\n            out += c\n    return out\n",
        "assert caesar('abc xyz!', 3) == 'def abc!'\nassert caesar('Hello', 0) == 'Hello'\nassert caesar('bcD', -1) == 'abC'",
    ),
    _task(
        "`transpose(matrix)` that returns the transpose of a matrix given as a list of rows, as a list of lists.",
        "def transpose(matrix):\n    return [list(row) for row in zip(*matrix)]\n",
        "assert transpose([[1, 2, 3], [4, 5, 6]]) == [[1, 4], [2, 5], [3, 6]]\nassert transpose([[7]]) == [[7]]",
    ),
    _task(
        "`balanced(text)` that says whether the brackets (), [] and {} of a text are balanced and properly nested.",
        "def balanced(text):\n    closing = {')': '(', ']': '[', '}': '{'}\n    stack = []\n    for c in text:\n"
        "        if c in '([{':\n            stack.append(c)\n        elif c in closing:\n"
        "            if not stack or stack.pop() != closing[c]:\n                return False\n    return not stack\n",
        "assert balanced('a(b[c]{d})')\nassert not balanced('(]')\nassert not balanced('((')\nassert not balanced(')')\n"
        "assert balanced('')",
    ),
    _task(
        "`run_lengths(text)` that returns a list of pairs (character, count) of the runs of equal characters in a text.",
        "def run_lengths(text):\n    out = []\n    for c in text:\n        if out and out[-1][0] == c:\n"
        "            out[-1] = (c, out[-1][1] + 1)\n        else:\n            out.append((c, 1))\n    return out\n",
        "assert [tuple(x) for x in run_lengths('aabccc')] == [('a', 2), ('b', 1), ('c', 3)]\n"
        "assert list(run_lengths('')) == []",
    ),
    _task(
        "`roman(n)` that returns the Roman numeral of an integer from 1 to 3999.",
        "def roman(n):\n    out = ''\n"
        "    for value, letters in ((1000, 'M'), (900, 'CM'), (500, 'D'), (400, 'CD'), (100, 'C'),\n"
        "                           (90, 'XC'), (50, 'L'), (40, 'XL'), (10, 'X'), (9, 'IX'), (5, 'V'), (4, 'IV'), (1, 'I')):\n"
        "        out += letters * (n // value)\n        n %= value\n    return out\n",
        "assert [roman(n) for n in (1, 4, 9, 14, 40, 1994, 3999)] == ['I', 'IV', 'IX', 'XIV', 'XL', 'MCMXCIV', 'MMMCMXCIX']",
    ),
    _task(
        "`merge(a, b)` that merges two sorted lists into one sorted list, without sorting.",
        "def merge(a, b):\n    out, i, j = [], 0, 0\n    while i < len(a) and j < len(b):\n        if a[i] <= b[j]:\n"
        "            out.append(a[i])\n            i += 1\n        else:\n            out.append(b[j])\n            j += 1\n"
        "    return out + a[i:] + b[j:]\n",
        "assert merge([1, 4], [2, 3, 9]) == [1, 2, 3, 4, 9]\nassert merge([], [1]) == [1]\nassert merge([], []) == []",
    ),
    _task(
        "`second_largest(numbers)` that returns the second largest distinct number of a list, or None if there is none.",
        "def second_largest(numbers):\n    distinct = sorted(set(numbers))\n"
        "    return distinct[-2] if len(distinct) > 1 else None\n",
        "assert second_largest([3, 9, 9, 5]) == 5\nassert second_largest([4, 4]) is None\nassert second_largest([]) is None",
    ),
)
