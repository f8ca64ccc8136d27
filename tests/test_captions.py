"""Captions reach the text encoder as LlamaGen's own code would send them."""

from __future__ import annotations

import html
import subprocess
import sys
import warnings

import pytest

from arsd.errors import InputError
from arsd.models.captions import clean_caption

# What upstream's language/t5.py (FoundationVision/LlamaGen at ce98ec4, ftfy 6.3.1, beautifulsoup4 4.15.0) makes of them.
UPSTREAM = [
    ("A Red CAT on a Mat.", "a red cat on a mat."),
    ("  two   spaces\tand\nlines ", "two spaces and lines"),
    ("A\xa0cat\u3000dog", "a cat dog"),
    ("\\nnew line", "new line"),
    ("", ""),
    # addresses, markup, people
    ("see http://Example.com/a?b=c&d for a dog", "see ?b=c d for a dog"),
    ("a dog from www.dogs.org/best today", "a dog from today"),
    ("server 192.168.0.1 room", "server room"),
    ("100%25 cotton+shirt %F0%9F%98%80", "100% cotton shirt 😀"),
    ("<b>Bold</b> cat &amp; dog", "bold cat dog"),
    ("a <person> and a &lt;dog&gt;", "a person and a"),
    ("@bob and @alice_1 smile", "and smile"),
    # quotes and dashes
    ("&quot;Hello&quot; says the cat", '"hello" says the cat'),
    ("“Curly” «quotes» and ‘single’ ones", '"curly" "quotes" and \'single\' ones'),
    ('"A fully quoted caption"', "a fully quoted caption"),
    ("'a cat'", "a cat"),
    ('it\'\'s ""big""', 'it"s "big"'),
    ("a cat—by—a–dog ‒ yes", "a cat by a dog yes"),
    ("this-is-my-cute-cat by this_is_my_dog", "this is my cute cat by this is my dog"),
    ("a well-known cat", "a well-known cat"),
    ("-- a cat --", "a cat"),
    # scripts
    ("漢字 a cat 猫", "a cat"),
    ("漢字", ""),
    ("カ cat か", "カ cat か"),
    ("cat 😀 ❤️ dog", "cat 😀 ❤️ dog"),
    ("schÃ¶n cafÃ©", "schã¶n cafã"),  # lower case comes before the repair, which so finds nothing to repair
    ("ﬁne ½ cat²", "fine cat²"),
    # numbers and files
    ("#1 cat #123 and #12345 and #1234", "cat and and 1234"),
    ("call 1234567 now", "call now"),
    ("cats at 3:45 ", "cats at 3:45"),
    ("photo IMG_1234.JPG of a dog", "photo of a dog"),
    ("a dog.jpeg", "a"),
    ("jc6640 and jc6640vc and 6640vc231 toys", "and and toys"),
    ("poster 20x30 of a 2.5x3.5 cat", "poster of a 2 5 cat"),
    # shop talk and punctuation
    ("Free Shipping worldwide shipping of a cat", "of a cat"),
    ("download free cat png images", "cat"),
    ("click for more cats page 3", "cats"),
    ("cats,dogs/birds.fish", "cats, dogs birds. fish"),
    ("a cat ... a dog . a bird", "a cat a dog a bird"),
    ("a cat :  dog : bird", "a cat: dog: bird"),
    ("*** SALE *** (cats) [dogs] {birds} | fish \\ end", "sale cats dogs birds fish end"),
    ("c++ and c# cats", "c and c cats"),
    ("?!", "?!"),
    # the cleaner of diffusers, which strips once less, leaves more of these
    ("~,‘q’", "q"),
    ("“quoted”...<b>", "quoted"),
    ("[_-cat-_]", "cat"),
    ('"cat" :--[', '"cat"'),
]


@pytest.mark.parametrize(("caption", "cleaned"), UPSTREAM)
def test_a_caption_is_cleaned_as_upstream_cleans_it(caption: str, cleaned: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a caption may look like a path or a URL
        assert clean_caption(caption) == cleaned


def test_the_cleaner_changes_nothing_outside_itself() -> None:
    from diffusers.pipelines.pixart_alpha import pipeline_pixart_alpha

    clean_caption("a cat")
    assert pipeline_pixart_alpha.html is html and html.unescape(" &lt; ") == " < "


@pytest.mark.parametrize("names", [["bs4"], ["ftfy"], ["bs4", "ftfy"]])
def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    with pytest.raises(InputError) as error:
        clean_caption("a cat")
    assert str(error.value) == f"cleaning captions needs {' and '.join(names)}: pip install 'arsd[captions]'"


def test_importing_the_module_needs_neither_package() -> None:
    code = "import sys, arsd.models.captions; sys.exit(bool({'bs4', 'ftfy', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
