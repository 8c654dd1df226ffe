"""Translates preprocessed Metal Shading Language to C++20.

The text is split into tokens and rewritten; line markers stay, so that diagnostics, debug information and reports of the
checker name lines of the .metal file. Three modes:

exec: address spaces vanish, threadgroup variables of a kernel become references into simulated memory, kernels and function
    constants register themselves with the runtime.
strict: address spaces become `__attribute__((address_space(N)))`; for `clang -fsyntax-only`.
gpu: as strict, with the loop pragmas; for a compiler that has a GPU as its target.

Macros alone would not do: `threadgroup` variables inside functions, `template [[host_name]] [[kernel]] decltype(...)`,
function constants and unsuffixed float literals (float in Metal) have no C++ counterpart.
"""

import re
import subprocess

TOK = re.compile(
    r"""(?P<ws>[ \t]+|\\\n)|(?P<nl>\n)|(?P<dir>^\#[^\n]*)|(?P<str>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
|(?P<num>\.?\d(?:[eEpP][+-]|[\w.'])*)|(?P<id>[A-Za-z_]\w*)|(?P<op>\[\[|\]\]|::|->|<<=|>>=|<=|>=|==|!=|&&|\|\||\+\+|--|[-+*/%&|^]=|.)""",
    re.X | re.M | re.S,
)
BUILTINS = {  # attribute -> id known to runtime.h
    "thread_position_in_grid": 1,
    "threads_per_grid": 2,
    "thread_position_in_threadgroup": 3,
    "threads_per_threadgroup": 4,
    "threadgroup_position_in_grid": 5,
    "threadgroups_per_grid": 6,
    "thread_index_in_threadgroup": 7,
    "simdgroup_index_in_threadgroup": 8,
    "thread_index_in_simdgroup": 9,
    "simdgroups_per_threadgroup": 10,
    "threads_per_simdgroup": 11,
    "thread_index_in_quadgroup": 12,
    "quadgroup_index_in_threadgroup": 13,
    "dispatch_threads_per_threadgroup": 4,
    "thread_execution_width": 11,
    "dispatch_simdgroups_per_threadgroup": 10,
}
SPACES = {"device": 1, "constant": 2, "threadgroup": 3, "thread": 0}


class TranslationError(Exception):
    pass


def tokenize(text):
    out = []
    for m in TOK.finditer(text):
        k = m.lastgroup
        out.append((k, m.group()))
    return out


class Rewriter:
    def __init__(self, text, mode):
        self.t = tokenize(text)
        self.mode = mode
        self.i = 0
        self.kernels = {}  # name -> list of param descriptors
        self.uid = 0

    # -- token helpers -------------------------------------------------
    def sig(self, i, step=1):
        """index of next significant token from i in direction step"""
        while 0 <= i < len(self.t) and (self.t[i][0] in ("ws", "nl", "dir") or not self.t[i][1]):
            i += step
        return i

    def match(self, i, o, c):
        d = 0
        while i < len(self.t):
            v = self.t[i][1]
            if self.t[i][0] != "str":
                if v == o:
                    d += 1
                elif v == c:
                    d -= 1
                    if d == 0:
                        return i
            i += 1
        raise TranslationError("unbalanced " + o)

    def text(self, a, b):
        return "".join(("\n" + v + "\n" if k == "dir" else v) for k, v in self.t[a:b])

    def flat(self, a, b):
        return [v for k, v in self.t[a:b] if v and k not in ("ws", "nl", "dir")]

    def blank(self, a, b, repl=""):
        """replace tokens a..b by repl but keep line structure"""
        nl = [x for x in self.t[a:b] if x[0] in ("nl", "dir")]
        keep = []
        for x in nl:
            if x[0] == "dir" and (not keep or keep[-1][0] != "nl"):
                keep.append(("nl", "\n"))
            keep.append(x)
        self.t[a:b] = [("op", repl), *keep]
        return a + 1 + len(keep)

    # -- passes ----------------------------------------------------------
    def fix_attr_tokens(self):
        # '[[' also appears as a[b[0]] -> ']]' ; only '[[' starts attributes, re-split stray ']]'
        out, _depth = [], 0
        stack = []
        for k, v in self.t:
            if k == "op" and v == "[[":
                # attribute only when followed by identifier of an attribute; subscripts of lambdas are not MSL
                stack.append("[[")
                out.append((k, v))
            elif k == "op" and v == "[":
                stack.append("[")
                out.append((k, v))
            elif k == "op" and v == "]]":
                if stack and stack[-1] == "[[":
                    stack.pop()
                    out.append((k, v))
                else:
                    for _ in range(2):
                        if stack:
                            stack.pop()
                        out.append(("op", "]"))
            elif k == "op" and v == "]":
                if stack:
                    stack.pop()
                out.append((k, v))
            else:
                out.append((k, v))
        self.t = out

    def literals(self):
        for i, (k, v) in enumerate(self.t):
            if k == "num":
                m = re.match(r"^((?:\d[\d']*\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(h|H|bf|BF)$", v)
                if not m and re.match(
                    r"^(\d[\d']*\.\d*|\.\d+|\d+\.?\d*[eE][+-]?\d+|\d+\.\d*[eE][+-]?\d+|\.\d+[eE][+-]?\d+)$",
                    v,
                ):
                    self.t[i] = ("num", v + "f")  # MSL: unsuffixed = float
                if m:
                    self.t[i] = (
                        "num",
                        "(({}){})".format(
                            "half" if m.group(2) in "hH" else "bfloat",
                            m.group(1) + ("f" if "." in m.group(1) or "e" in m.group(1) else ""),
                        ),
                    )

    def parse_params(self, a, b):
        """tokens a..b = inside of kernel parameter list -> descriptors; strips attributes in place"""
        params, start, d = [], a, 0
        i = a
        spans = []
        while i <= b:
            v = self.t[i][1] if i < b else ","
            if i < b and v in ("(", "[", "<", "{", "[["):
                d += 1
            elif i < b and v in (")", "]", ">", "}", "]]"):
                d -= 1
            if v == "," and d == 0:
                spans.append((start, i))
                start = i + 1
            i += 1
        for s, e in spans:
            toks = self.flat(s, e)
            if not toks:
                continue
            attrs = {}
            j = 0
            while j < len(toks):
                if toks[j] == "[[":
                    j += 1
                    while toks[j] != "]]":
                        name = toks[j]
                        j += 1
                        arg = ""
                        if toks[j] == "(":
                            j += 1
                            while toks[j] != ")":
                                arg += toks[j]
                                j += 1
                            j += 1
                        attrs[name] = arg
                        if toks[j] == ",":
                            j += 1
                j += 1
            cond = attrs.get("function_constant")
            core = toks[: toks.index("[[")] if "[[" in toks else toks
            const = "const" in core[: core.index("*")] if "*" in core else True
            if "*" not in core and "&" in core:  # reference: const unless a plain device reference
                const = "const" in core or "constant" in core
            if "constant" in core:
                const = True
            if "buffer" in attrs:
                params.append(("MSL_BUF", attrs["buffer"], cond, const))
            elif "threadgroup" in attrs:
                params.append(("MSL_TG", attrs["threadgroup"], cond, False))
            else:
                b_ = [x for x in attrs if x in BUILTINS]
                if b_ and not re.match(
                    r"^(const )?(thread )?(metal :: )?(ushort|uint|uint16_t|uint32_t)[23]? ",
                    " ".join(core),
                ):
                    raise TranslationError(f"{b_[0]} must be ushort/uint (2, 3)")
                if b_:
                    params.append(("MSL_BUILTIN", BUILTINS[b_[0]], None, True))
                else:
                    raise TranslationError("kernel parameter without a binding: " + " ".join(toks))
        indices = [index for kind, index, condition, _ in params if kind == "MSL_BUF" and not condition]
        if len(indices) != len(set(indices)):
            raise TranslationError("duplicate buffer index in kernel parameters")
        return params

    def kernels_pass(self):
        """find [[kernel]] / kernel functions and explicit instantiations"""
        i = 0
        while i < len(self.t):
            k, v = self.t[i]
            if k == "id" and v == "template":
                n = self.sig(i + 1)
                if self.t[n][1] != "<":  # explicit instantiation
                    e = n
                    while self.t[e][1] != ";":
                        e += 1
                    i = self.instantiation(i, e)
                    continue
            is_k = k == "id" and v == "kernel"
            if v == "[[":
                e = self.match(i, "[[", "]]")
                is_k = "kernel" in self.flat(i, e)
            if is_k:
                j = i if k == "id" else self.match(i, "[[", "]]")
                self.blank(i, j + 1)
                # function name = identifier before the first '(' at depth 0
                p = i
                while self.t[p][1] != "(":
                    if self.t[p][1] == "[[":
                        p = self.match(p, "[[", "]]")
                    p += 1
                nm = self.sig(p - 1, -1)
                name = self.t[nm][1]
                if "void" not in self.flat(i, nm):
                    raise TranslationError(f"kernel {name} must return void")
                q = self.match(p, "(", ")")
                desc = self.parse_params(p + 1, q)
                body = self.sig(q + 1)
                while self.t[body][1] == "[[":
                    body = self.sig(self.match(body, "[[", "]]") + 1)
                fwd = self.t[body][1] == ";"
                end = body if fwd else self.match(body, "{", "}")
                # templated?
                s = i
                while s > 0 and not (self.t[s - 1][1] in (";", "}") or (self.t[s - 1][0] == "dir" and False)):
                    s -= 1
                templated = "template" in self.flat(s, i)
                if not fwd or name not in self.kernels:
                    first = name not in self.kernels
                    self.kernels[name] = desc
                    if self.mode == "exec" and first:
                        self.t.insert(end + 1, ("op", self.desc_code(name, desc, not templated)))
                i = p
                continue
            i += 1

    def desc_code(self, name, desc, reg):
        rows = (
            ",".join(
                "{{{},{},{},{}}}".format(
                    k,
                    ix,
                    f"+[]()->bool{{return bool({c});}}" if c else "nullptr",
                    "true" if ro else "false",
                )
                for k, ix, c, ro in desc
            )
            or "{MSL_BUF,-1,nullptr,true}"
        )
        s = f" static const msl::Param msl_desc_{name}[]={{{rows}}}; "
        if reg:
            s += self.reg_code(name, name, f'"{name}"')
        return s

    def reg_code(self, base, expr, host):
        self.uid += 1
        bind = f"&msl::Bind<decltype(&{expr})>::call<&{expr}>"
        return f" static msl::Reg msl_reg_{self.uid}({host},{bind},msl_desc_{base},{len(self.kernels[base])}); "

    def instantiation(self, a, e):
        toks = self.flat(a, e)
        host = None
        j = 0
        core = []
        while j < len(toks):
            if toks[j] == "[[":
                while toks[j] != "]]":
                    if toks[j] == "host_name":
                        j += 2
                        host = ""
                        while toks[j] != ")":
                            host += toks[j]
                            j += 1
                        host = '"' + "".join(re.findall(r'"((?:\\.|[^"\\])*)"', host)) + '"'
                    j += 1
                j += 1
                continue
            core.append(toks[j])
            j += 1
        if host is None:
            return e
        # decltype(F<A>) F<A>   or   void F<A>(params)
        body = core[1:]
        if body[0] == "decltype":  # decltype(F<A>) F<A>
            start, depth = 1, 1
            while depth:
                start += 1
                depth += {"(": 1, ")": -1}.get(body[start], 0)
            expr = " ".join(body[start + 1 :])
        else:  # void F<A>(parameters)
            end, depth = 1, 0
            while body[end] != "(" or depth:
                depth += {"<": 1, ">": -1}.get(body[end], 0)
                end += 1
            expr = " ".join(body[1:end])
        base = expr.split()[0]
        if self.mode == "exec":
            code = self.reg_code(base, expr, host)
        else:
            self.uid += 1
            code = f" inline constexpr auto msl_inst_{self.uid} = &{expr};"
        return self.blank(a, e + 1, code)

    def globals_and_attrs(self):
        i, _depth = 0, 0
        while i < len(self.t):
            v = self.t[i][1]
            if v == "[[":
                e = self.match(i, "[[", "]]")
                f = self.flat(i, e + 1)
                if "function_constant" in f and self.mode == "exec":
                    ix = "".join(f[f.index("(") + 1 : f.index(")")])
                    nm = self.t[self.sig(i - 1, -1)][1]
                    s = i
                    while self.t[s - 1][1][-1:] not in (";", "}", "{", ")") and self.t[s - 1][0] != "dir":
                        s -= 1
                    s = self.sig(s)
                    decl = list(self.flat(s, i))
                    if "constant" in decl and decl[-1] == nm and self.t[self.sig(e + 1)][1] == ";":
                        q = self.sig(e + 1)
                        code = 'msl_fcvar {} {}; static msl::FCReg msl_fc_{}({},&{},"{}");'.format(
                            " ".join(x for x in decl[:-1] if x not in ("constant", "const")),
                            nm,
                            nm,
                            ix,
                            nm,
                            nm,
                        )
                        i = self.blank(s, q + 1, code)
                        continue
                i = self.blank(i, e + 1)
                continue
            i += 1

    def address_spaces(self):
        i = 0
        while i < len(self.t):
            k, v = self.t[i]
            if k == "id" and v in SPACES:
                p = self.sig(i - 1, -1)
                n = self.sig(i + 1)
                pv = self.t[p][1]
                if pv in (".", "->", "::") or (self.t[n][1] in ("=", ")", ",") and False):
                    i += 1
                    continue
                if v == "threadgroup" and pv[-1:] in (";", "{", "}"):
                    e = i
                    while self.t[e][1] != ";":
                        e += 1
                    f = self.flat(i + 1, e)
                    d = 0
                    ptr = False
                    for x in f:
                        if x in "(<":
                            d += 1
                        elif x in ")>":
                            d -= 1
                        elif x == "=" or x == "[":
                            break
                        elif x in ("*", "&") and d == 0:
                            ptr = True
                    if not ptr and "=" in f:
                        raise TranslationError("threadgroup variable cannot be initialised: " + " ".join(f[:6]))
                    if not ptr and "(" not in f[-1:]:
                        if self.mode == "exec":
                            self.uid += 1
                            names, d, last = [], 0, None
                            for x in [*f, ","]:
                                if x in ("(", "[", "<"):
                                    if x == "[" and d == 0 and last:
                                        names.append(last)
                                        last = None
                                    d += 1
                                elif x in (")", "]", ">"):
                                    d -= 1
                                elif x == "," and d == 0:
                                    if last:
                                        names.append(last)
                                    last = None
                                elif d == 0 and re.match(r"[A-Za-z_]\w*$", x):
                                    last = x
                            code = f"struct msl_tg_{self.uid} {{{' '.join(f)};}}; "
                            code += " ".join(
                                f'auto& {x} = msl::tg_alloc<msl_tg_{self.uid}>({self.uid},"{names[0]}").{x};' for x in names
                            )
                            i = self.blank(i, e + 1, code)
                            continue
                        self.t[i] = ("op", "static MSL_AS3")
                        i += 1
                        continue
                if self.mode == "exec":
                    self.t[i] = ("id", "const") if v == "constant" else ("op", "")
                else:
                    self.t[i] = ("op", f"MSL_AS{SPACES[v]}")
            i += 1

    VEC = re.compile(r"^(bool|u?char|u?short|u?int|u?long|half|bfloat|float)[234]$")

    def vector_ctors(self):
        """strict: ext_vector_type has no T(a,b,c) constructor in C++ -> msl_mk<T>(a,b,c)"""
        i = 0
        while i < len(self.t):
            k, v = self.t[i]
            if k == "id" and (self.VEC.match(v) or v == "vec"):
                e = i
                p = self.sig(i - 1, -1)
                if v == "vec":
                    n = self.sig(i + 1)
                    if self.t[n][1] != "<" or self.t[p][1] in ("class", "struct", "using"):
                        i += 1
                        continue
                    e, d = n, 0
                    while True:
                        if self.t[e][1] == "<":
                            d += 1
                        elif self.t[e][1] == ">":
                            d -= 1
                            if d == 0:
                                break
                        e += 1
                n = self.sig(e + 1)
                if self.t[n][1] == "(" and self.t[p][1] != "operator":
                    self.t[e] = (self.t[e][0], self.t[e][1] + ">")
                    self.t[i] = (k, "msl_mk<" + self.t[i][1])
            i += 1

    def fc_extern(self):
        for i in range(len(self.t)):
            if self.t[i][1] == "[[":
                e = self.match(i, "[[", "]]")
                if "function_constant" in self.flat(i, e) and self.t[self.sig(e + 1)][1] == ";":
                    s = i
                    while self.t[s - 1][1][-1:] not in (";", "}", "{", ")") and self.t[s - 1][0] != "dir":
                        s -= 1
                    s = self.sig(s)
                    if self.t[s][1] == "constant":
                        self.t[s] = ("op", "extern MSL_AS2")

    def strip_pragmas(self):
        self.t = [(k, "" if k == "dir" and "unroll" in v else v) for k, v in self.t]

    def run(self):
        self.fix_attr_tokens()
        if self.mode != "gpu":
            self.strip_pragmas()
        self.literals()
        if self.mode != "exec":
            self.vector_ctors()
            self.fc_extern()
        self.kernels_pass()
        self.globals_and_attrs()
        self.address_spaces()
        return "".join(v for k, v in self.t)


def preprocess(source, includes=(), defines=(), clang="clang++-19", shim="") -> str:
    """Returns the preprocessed text of a .metal file; `shim` holds our `metal_*` headers."""
    command = [clang, "-E", "-x", "c++", "-std=c++20", "-nostdinc", "-nostdinc++"]
    command += ["-D__METAL__=1", "-D__METAL_VERSION__=310", "-I", str(shim)]
    command += [flag for folder in includes for flag in ("-I", str(folder))]
    command += [f"-D{define}" for define in defines]
    result = subprocess.run([*command, str(source)], capture_output=True, text=True, check=False)
    if result.returncode:
        raise TranslationError(result.stderr)
    return result.stdout


def convert(source, includes=(), defines=(), mode="exec", clang="clang++-19", shim="") -> str:
    """Returns the C++ text of a .metal file: `exec` to run it, `strict` for a syntax check, `gpu` to compile it for a GPU."""
    rewriter = Rewriter(preprocess(source, includes, defines, clang, shim), mode)
    header = {"exec": "runtime.h", "strict": "strict.h", "gpu": "gpu.h"}[mode]
    return f'#define MSL_MODE_{mode.upper()} 1\n#include "msl/{header}"\n' + rewriter.run()
