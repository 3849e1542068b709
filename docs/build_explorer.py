"""Write explorer.html: `python docs/build_explorer.py`.

A page where one changes a cell and sees what it reads and costs. It needs no other file and no network; two runs write the
same bytes. What is on it is made by search/reports/explorer_page.py.
"""

from pathlib import Path

from search.reports.explorer_page import write_explorer

PAGE = Path(__file__).with_name("explorer.html")

if __name__ == "__main__":
    write_explorer(PAGE)
    print(f"{PAGE}: {PAGE.stat().st_size:,} bytes")
