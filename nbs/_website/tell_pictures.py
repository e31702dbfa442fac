"""Run in each kernel before the first cell: pictures carry their text for readers who cannot see them."""

import IPython.core.pylabtools as _tools

_draw = _tools.print_figure


def _told(figure, *args, **options):
    from medmatting.plots import alt_text

    return _draw(figure, *args, **options), {"alt": alt_text(figure)}


_tools.print_figure = _told
