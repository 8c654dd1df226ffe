"""Cheap token lint for what the strict clang pass cannot see (rules of the Metal compiler)."""

import re

import msl_translate

BAN = {
    "double": "double is not a Metal type",
    "throw": "no exceptions",
    "try": "no exceptions",
    "catch": "no exceptions",
    "new": "no dynamic allocation",
    "delete": "no dynamic allocation",
    "virtual": "no virtual functions",
    "dynamic_cast": "no RTTI",
    "typeid": "no RTTI",
    "goto": "goto unsupported",
    "thread_local": "unsupported storage class",
    "register": "unsupported storage class",
    "asm": "no inline asm",
    "wchar_t": "unsupported type",
    "std": "no C++ standard library (metal:: only)",
    "co_await": "unsupported",
    "co_yield": "unsupported",
    "requires": "C++20 concepts unsupported",
    "concept": "C++20 concepts unsupported",
    "consteval": "C++20",
    "constinit": "C++20",
    "printf": "no printf",
}
TYPES = {
    "float",
    "half",
    "bfloat",
    "int",
    "uint",
    "short",
    "ushort",
    "char",
    "uchar",
    "long",
    "ulong",
    "size_t",
    "uint8_t",
    "uint16_t",
    "uint32_t",
    "uint64_t",
    "int8_t",
    "int16_t",
    "int32_t",
    "int64_t",
    "bool",
    "void",
    "auto",
    "T",
    "U",
    "float2",
    "float4",
    "half2",
    "half4",
    "uint2",
    "uint4",
}

# Words that a statement at program scope may hold without being a variable outside the constant address space.
NOT_VARIABLES = {
    *("typedef", "using", "struct", "class", "template", "enum"),
    *("extern", "constant", "static_assert", "friend", "namespace"),
}


def lint(text, own):
    rw = msl_translate.Rewriter(text, "strict")
    rw.fix_attr_tokens()
    t = rw.t
    out, line, file = [], 0, ""
    toks = []
    for k, v in t:
        if k == "dir":
            m = re.match(r'#\s*(?:line\s+)?(\d+)\s+"([^"]*)"', v)
            if m:
                line, file = int(m.group(1)) - 1, m.group(2)
        elif k == "nl":
            line += 1
        elif k == "ws":
            line += v.count("\n")
        else:
            toks.append((k, v, file, line))

    def rep(i, msg):
        out.append(f"{toks[i][2]}:{toks[i][3]}: {msg}")

    def isown(f):
        return own(f)

    kern = {
        toks[x + y][1]
        for x in range(len(toks))
        if toks[x][1] == "kernel"
        for y in range(1, 8)
        if x + y + 1 < len(toks) and toks[x + y + 1][1] == "(" and toks[x + y][0] == "id"
    }
    defs, calls, fn, _depth, stack, stmt, _par = {}, {}, None, 0, [], [], 0
    for i, (k, v, f, _l) in enumerate(toks):
        nx = toks[i + 1][1] if i + 1 < len(toks) else ""
        pv = toks[i - 1][1] if i else ""
        if k == "id" and isown(f):
            if v in BAN and pv not in (".", "->") and not (v in ("delete", "default") and pv == "="):
                rep(i, BAN[v])
            if v == "long" and nx == "long":
                rep(i, "long long is not a Metal type")
        if (
            (v == "[" and nx == "]" and pv in ("=", "(", ",", "return"))
            or (v == "[" and nx in ("&", "=") and i + 2 < len(toks) and toks[i + 2][1] == "]")
        ) and isown(f):
            rep(i, "lambda expressions need Metal 4 / are unsupported before")
        # pointer / reference declarators without an address space
        if (
            isown(f)
            and k == "id"
            and v in TYPES
            and nx in ("*", "&")
            and i + 2 < len(toks)
            and (toks[i + 2][0] == "id" or toks[i + 2][1] in (")", ">"))
        ):
            j, quals = i - 1, []
            while j >= 0 and (toks[j][0] == "id" and toks[j][1] not in ("return",)):
                quals.append(toks[j][1])
                j -= 1
            k2 = toks[j][1] if j >= 0 else ""
            after = toks[i + 3][1] if i + 3 < len(toks) else ""
            decl = toks[i + 2][1] in (")", ">") or after in (",", ")", ";", "=", "[", "[[", "{")
            if decl and not set(quals) & set(msl_translate.SPACES) and k2 in ("(", ",", ";", "{", "}", "<"):
                rep(
                    i,
                    "pointer/reference without address space: {} {}{}".format(" ".join(quals[::-1]), v, nx),
                )
        if isown(f) and k == "id":
            if fn and v == "static" and not {"constant", "constexpr"} & {x[1] for x in toks[i + 1 : i + 4]}:
                rep(i, "function-scope static variable")
            if (
                fn
                and v == "threadgroup"
                and pv in (";", "{", "}")
                and fn not in kern
                and "*" not in [x[1] for x in toks[i + 1 : i + 6]]
            ):
                rep(i, "threadgroup variable outside a kernel function")
        if v == "(" and isown(f) and i + 2 < len(toks):
            if nx == "*" and toks[i + 2][0] == "id" and toks[i + 3][1] == ")" and toks[i + 4][1] == "(":
                rep(i, "function pointer")
            j = i + 1
            while j < len(toks) and (toks[j][0] == "id" or toks[j][1] in ("::",)):
                j += 1
            if (
                j > i + 1
                and toks[j][1] == "*"
                and toks[j + 1][1] == ")"
                and (toks[j + 2][0] in ("id", "num") or toks[j + 2][1] in ("(", "&"))
                and toks[i - 1][1] not in ("sizeof", "alignof")
                and fn
            ):
                rep(i, "C-style pointer cast (may change address space; use reinterpret_cast)")
        # scopes
        if v == "{":
            kind = (
                "fn"
                if pv == ")" or (pv in ("const", *tuple(msl_translate.SPACES)))
                else "ns"
                if "namespace" in stmt
                else "ty"
                if set(stmt) & {"struct", "class", "enum", "union"}
                else "init"
                if "=" in stmt
                else "blk"
            )
            if kind == "fn" and not any(s[0] == "fn" for s in stack):
                m = [x for x in range(len(stmt)) if stmt[x] == "("]
                name = stmt[m[0] - 1] if m and m[0] else "?"
                fn = name
                defs.setdefault(fn, i)
                calls.setdefault(fn, set())
            stack.append((kind, fn))
            if kind != "init":
                stmt = []
            continue
        if v == "}":
            if stack:
                kd = stack.pop()
                if kd[0] == "fn" and not any(s[0] == "fn" for s in stack):
                    fn = None
                if kd[0] == "init":
                    continue
            stmt = []
            continue
        if v == ";":
            in_body = any(scope[0] in ("fn", "ty", "blk") for scope in stack)
            declaration = stmt[: stmt.index("=")] if "=" in stmt else stmt
            variable = len(stmt) > 1 and "(" not in declaration and not set(stmt) & NOT_VARIABLES
            if variable and not in_body and isown(f):
                rep(i, "program-scope variable must be in the constant address space: " + " ".join(stmt)[:60])
            stmt = []
            continue
        stmt.append(v)
        if fn and k == "id" and nx in ("(", "<"):
            calls[fn].add(v)
    for a in calls:  # recursion
        seen, todo = set(), list(calls[a])
        while todo:
            b = todo.pop()
            if b == a:
                if isown(toks[defs[a]][2]):
                    rep(defs[a], f"recursion through {a}()")
                break
            if b in seen or b not in calls:
                continue
            seen.add(b)
            todo += calls[b]
    return sorted(set(out))
