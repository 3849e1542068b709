"""Reports as single HTML files that need no other file: templates, formatted numbers, atomic writing."""

from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup, escape

from reference.cell import input_name
from search.errors import InputError
from search.files import write_text
from search.reports.diagram import operation_colours, operation_label, shortened


def write_page(path: Path, template: str, content: dict[str, Any], *, folder: Path | None = None) -> None:
    """Fill the template and write it, whole or not at all. Raises InputError if the file cannot be written.

    The template, and whatever it extends and imports, lies in `folder`, if that is given, or in this one.
    """
    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder or here, here]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "quantity": quantity,
        "thousands": "{:,}".format,
        "operation_label": operation_label,
        "operation_colours": operation_colours,
        "input_name": input_name,
        "milliseconds": milliseconds,
        "name": name_in_page,
    }
    page = environment.get_template(template).render(content)
    try:
        write_text(path, page)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): make its folder writable, or give another place") from error


def name_in_page(name: str) -> Markup:
    """A name somebody gave, so that a long one does not stretch the page: its middle is left out, and hovering shows it all.

    >>> name_in_page("R&D")
    Markup('R&amp;D')
    """
    short = shortened(name)
    return escape(name) if short == name else Markup('<span title="{}">{}</span>').format(name, short)


def percent(fraction: float, digits: int = 2) -> str:
    """Format a fraction as percent.

    >>> percent(0.46123)
    '46.12 %'
    """
    return f"{100 * fraction:.{digits}f} %"


def quantity(count: float) -> str:
    """Format a large count with three digits and a unit.

    >>> quantity(804_000), quantity(15_230_000_000), quantity(999_900), quantity(9_999)
    ('804 K', '15.2 B', '1.00 M', '10.0 K')
    """
    rounded = float(f"{count:.3g}")
    for limit, unit in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if rounded >= limit:
            value = rounded / limit
            return f"{value:.{max(0, 2 - int(np.log10(value)))}f}{unit}"
    return f"{count:g}"


def milliseconds(value: float) -> str:
    """Format a duration with three digits.

    >>> milliseconds(0.01234), milliseconds(2.9), milliseconds(99.96)
    ('0.0123', '2.90', '100')
    """
    return f"{value:#.3g}" if value < 99.95 else f"{value:.0f}"
