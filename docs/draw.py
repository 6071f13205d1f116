"""Draw the pictures of the documentation: ``python docs/draw.py`` writes docs/_static/*.svg."""

import re
from itertools import product
from pathlib import Path
from statistics import mean
from xml.sax.saxutils import escape

from gcx import Layout

HERE = Path(__file__).parent
WIDTH, EDGE = 400, 16

GRADIENT = ((5, 1, 3, -1), (-4, 2, 0, 6))

# The layer, the names of the axes of its kernel, the shape drawn here, and the layout.
KERNELS = {
    "torch": (
        ("Linear", "o i", (3, 4), Layout("o...")),
        ("Conv2d", "o i h w", (3, 2, 2, 2), Layout("o...")),
        ("ConvTranspose2d", "i o h w", (2, 3, 2, 2), Layout("io...")),
        ("ConvTranspose2d, groups=2", "i o h w", (4, 2, 2, 2), Layout("(bi)o...", b=2)),
    ),
    "flax": (
        ("Linear", "i o", (4, 3), Layout("io")),
        ("Conv", "h w i o", (2, 2, 2, 3), Layout("...o")),
        ("ConvTranspose", "h w i o", (2, 2, 2, 3), Layout("...o")),
        ("MultiHeadAttention, query", "i head depth", (4, 2, 2), Layout("ioo")),
    ),
    "keras": (
        ("Dense", "i o", (4, 3), Layout("...o")),
        ("Conv2D", "h w i o", (2, 2, 2, 3), Layout("...o")),
        ("Conv2DTranspose", "h w o i", (2, 2, 3, 2), Layout("...oi")),
        ("DepthwiseConv2D", "h w channel multiplier", (2, 2, 2, 2), Layout("...oo")),
    ),
}
# Boxes of modules: left, top, width, and the words, with the title first.
MODULES = (
    (16, 92, 368, ("adapters", "torch/ optax/ keras/ thinc/", "lightning.py transformers.py")),
    (16, 204, 176, ("the decision", "_rules.py", "_decisions.py", "plan.py")),
    (208, 204, 176, ("the operator", "_centralize.py", "_names.py", "_means.py")),
    (16, 324, 152, ("layout.py", "text to axes")),
    (208, 324, 176, ("_dispatch.py", "array to backend")),
    (208, 404, 176, ("backends/", "_numpy _torch", "_jax _cupy", "_array_api cuda/")),
)
DOWN = ((104, 68, 24), (296, 68, 24), (104, 164, 40), (296, 164, 40), (104, 296, 28))
DOWN += ((296, 296, 28), (296, 376, 28))  # arrows between them: x, y and length
FILLS = ("#8ecae6", "#ffd166", "#f4a6a6", "#a3d9a5")
MINUS = "\N{MINUS SIGN}"
BLUE, ORANGE = "#4a9fd8", "#e8833a"
STYLE = """
.page { fill: #fff } text { font: 14px system-ui, sans-serif; fill: #222 }
.bold { font-weight: bold } .muted { fill: #666; font-size: 12px } .middle { text-anchor: middle }
.end { text-anchor: end } .cell { fill: #111; text-anchor: middle } .line { stroke: #333 }
@media (prefers-color-scheme: dark) { .line { stroke: #ccc }
.page { fill: #16181c } text { fill: #ddd } .muted { fill: #aaa } .cell { fill: #111 } }
"""


def draw_all():
    """Return the text of each picture by its name."""
    axes = {  # two pictures for each library, which a wide page shows side by side
        f"axes-{name}-{half + 1}": draw_axes(name, kernels[2 * half : 2 * half + 2])
        for name, kernels in KERNELS.items()
        for half in (0, 1)
    }
    bars = {"energy": draw_energy(), "speed": draw_speed()}
    others = {"centralize": draw_centralize(), "icon": draw_icon(), "modules": draw_modules()}
    return {**others, **bars, **axes}


def draw_icon():
    parts = [rectangle(0, 0, 7, 7, ORANGE), rectangle(9, 9, 7, 7, ORANGE)]
    parts += [rectangle(9, 0, 7, 7, BLUE), rectangle(0, 9, 7, 7, BLUE)]
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 16 16">{"".join(parts)}</svg>\n'


def draw_centralize():
    """Subtract the mean of each row."""
    size, gap, left, top = 35, 24, EDGE, 80
    means = [[mean(row)] for row in GRADIENT]
    result = [[value - mean(row) for value in row] for row in GRADIENT]
    tables = (("gradient", "", GRADIENT), ("mean", MINUS, means), ("centralized", "=", result))
    parts = []
    for title, sign, table in tables:
        width = size * len(table[0])
        parts.append(text(left - gap / 2, top + size + 5, sign, "middle bold"))
        parts.append(text(left + width / 2, top - 12, title, "middle bold"))
        for row, values in enumerate(table):
            for column, value in enumerate(values):
                fill = mix(ORANGE if value > 0 else BLUE, abs(value) / 6)
                parts += cell(left + column * size, top + row * size, size, f"{value:g}", fill)
        left += width + gap
    top += 2 * size
    parts.append(text(EDGE, top + 26, "A row holds all weights that feed one output unit."))
    parts.append(text(EDGE, top + 48, "After the subtraction each row sums to zero."))
    return svg("A mean is subtracted from each row", top + 62, parts)


def draw_axes(framework, kernels):
    """Draw kernels as NumPy prints them, where the cells of one mean share a colour."""
    parts, top = [], 40
    for layer, names, shape, layout in kernels:
        drawn, height = draw_kernel(top, layer, names.split(), shape, layout)
        parts += drawn
        top += height
    return svg(f"{framework}: one mean for each colour", top, parts)


def draw_kernel(top, layer, names, shape, layout):
    size, gap, left, down = 26, 8, EDGE + 58, 74
    view, fan_in = layout.split(shape)
    places = [*product(*map(range, view))]
    unit_of = [tuple(p for axis, p in enumerate(place) if axis not in fan_in) for place in places]
    units = {unit: number for number, unit in enumerate(dict.fromkeys(unit_of))}
    full = (1,) * (4 - len(shape)) + tuple(shape)  # blocks down and across, cells down and across
    sizes = ", ".join(f"{name} {length}" for name, length in zip(names, shape, strict=True))
    described = f"{sizes}; {len(units)} means; layout {str(layout)!r}"
    parts = [text(EDGE, top + 22, layer, "bold"), text(EDGE, top + 40, described, "muted")]
    cells = product(*map(range, full))
    for (block_row, block, row, column), unit in zip(cells, unit_of, strict=True):
        x = left + (block * full[3] + column) * size + block * gap
        y = top + down + (block_row * full[2] + row) * size + block_row * gap
        parts += cell(x, y, size, str(units[unit] + 1), FILLS[units[unit]])
    *rows, columns = names[:-2] or names
    parts.append(text(left, top + down - 10, f"{columns} →"))
    parts += [text(left - 10, top + down + 18, f"{name} ↓", "end") for name in rows]
    if len(names) > 2:
        note = "in a block: {} ↓ {} →".format(*names[-2:])
        parts.append(text(left + 90, top + down - 10, note, "muted"))
    return parts, down + full[0] * (full[2] * size + gap) + 14


def draw_energy():
    """Draw the first report of diagnostics.md as its bar chart does."""
    report = (HERE / "diagnostics.md").read_text("utf-8").split("```text")[1].split("```")[0]
    found = re.findall(r"(?m)^(\S+\.\S+) .* ([\d.]+)% +([\d.]+)% to ([\d.]+)% +([\d.]+)%", report)
    left, top, scale, parts = 96, 48, 4.6, []
    for name, *percent in found:
        removed, lowest, highest, by_chance = (left + float(number) * scale for number in percent)
        parts.append(text(left - 8, top + 17, name, "end"))
        parts.append(rectangle(left, top, removed - left, 24, BLUE))
        parts.append(line(lowest, top + 12, highest, top + 12))
        parts += [line(x, top + 7, x, top + 17) for x in (lowest, highest)]
        parts.append(rectangle(by_chance - 1.5, top - 3, 3, 30, ORANGE))
        parts.append(text(highest + 6, top + 17, f"{percent[0]}%", "muted"))
        top += 40
    parts += [rectangle(EDGE, top + 2, 12, 12, BLUE), line(112, top + 8, 132, top + 8)]
    parts.append(rectangle(226, top, 3, 16, ORANGE))
    legend = ((34, "all batches"), (138, "least to most"), (236, "by chance: 1 / fan-in"))
    parts += [text(x, top + 13, meaning, "muted") for x, meaning in legend]
    return svg("Gradient energy that GC removes", top + 30, parts)


def draw_speed():
    """Draw the ratios of _generated/cpu.md in float32 for each library and array size."""
    tables = (HERE / "_generated" / "cpu.md").read_text("utf-8")
    parts = [text(EDGE, 46, re.match(r"Taken on .*?: (.*)\.", tables)[1], "muted")]
    top, left = 94, 120
    scale = (WIDTH - EDGE - left) / 1.25
    one = left + 0.5 * scale
    parts.append(text(one - 8, 70, "\N{LEFTWARDS ARROW} gcx is faster", "end muted"))
    for library in ("numpy", "torch", "jax"):
        section = tables.split(f"### {library}\n")[1].split("\n### ")[0]
        cells = re.findall(r"(?m)^\|[^|,]+\| (\d+ .B) [^|]+\|[^|]+\|[^|]+\| ([\d.]+) \|", section)
        for size in dict.fromkeys(size for size, _ in cells):
            ratios = [float(ratio) for of, ratio in cells if of == size]
            parts.append(text(left - 12, top + 5, f"{library}, {size}", "end"))
            parts.append(line(left, top, WIDTH - EDGE, top, 0.3))
            parts += [circle(left + (ratio - 0.5) * scale, top, BLUE) for ratio in ratios]
            top += 26
        top += 10
    parts.append(line(one, 60, one, top - 20))
    for x in (0.5, 1, 1.5):
        parts.append(text(left + (x - 0.5) * scale, top, f"{x:g}", "middle muted"))
    return svg("Time of gcx over the plain expression", top + 16, parts)


def draw_modules():
    """Draw the boxes of how_it_is_built.md."""
    parts = []
    for left, top, width, (title, *words) in MODULES:
        height = 32 + 20 * len(words)
        size = f'x="{left}" y="{top}" width="{width}" height="{height}"'
        parts.append(f'<rect class="line" {size} rx="6" fill="{BLUE}" fill-opacity=".12"/>')
        parts.append(text(left + width / 2, top + 21, title, "middle bold"))
        for row, word in enumerate(words, 1):
            parts.append(text(left + width / 2, top + 21 + 20 * row, word, "middle"))
    for x, y, length in DOWN:
        parts.append(line(x, y, x, y + length))
        parts += [line(x, y + length, x + aside, y + length - 6) for aside in (-4, 4)]
    parts += [line(208, 350, 168, 350), line(168, 350, 174, 346), line(168, 350, 174, 354)]
    parts += [text(104, 62, "your model", "middle"), text(296, 62, "your step", "middle")]
    parts += [text(114, 189, "layers", "muted"), text(306, 189, "gradients", "muted")]
    return svg("The modules of gcx", 512, parts)


def svg(title, height, parts):
    size = f'viewBox="0 0 {WIDTH} {height:g}" width="480" role="img"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n<title>{escape(title)}</title>'
    page = f'<rect class="page" width="{WIDTH}" height="{height:g}" rx="8"/>'
    parts = [text(EDGE, 28, title, "bold"), *parts]
    return "\n".join([head, f"<style>{STYLE}</style>", page, *parts, "</svg>\n"])


def text(x, y, content, css=""):
    return f'<text x="{x:g}" y="{y:g}" class="{css}">{escape(content)}</text>'


def rectangle(x, y, width, height, fill):
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}"/>'


def circle(x, y, fill):
    return f'<circle cx="{x:g}" cy="{y:g}" r="5" fill="{fill}" fill-opacity=".6"/>'


def line(x1, y1, x2, y2, width=1.5):
    ends = f'x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"'
    return f'<line class="line" {ends} stroke-width="{width}"/>'


def cell(x, y, size, content, fill):
    middle = text(x + size / 2, y + size / 2 + 5, content.replace("-", MINUS), "cell")
    return rectangle(x + 1, y + 1, size - 2, size - 2, fill), middle


def mix(colour, share):
    """Mix a colour with white."""
    channels = (int(colour[k : k + 2], 16) for k in (1, 3, 5))
    return "#" + "".join(f"{round(255 - (255 - channel) * share):02x}" for channel in channels)


if __name__ == "__main__":
    for name, drawn in draw_all().items():
        (HERE / "_static" / f"{name}.svg").write_text(drawn, encoding="utf-8")
