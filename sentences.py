"""The sentences of a result, by a punctuation model."""
from punctuation import Punctuation, punctuate_words
from report import Result, Sentence, Word, is_ideograph, join_words


def with_sentences(punctuation: Punctuation | None, result: Result, last: str = "") -> Result:
    """The result with `sentences`: its words with their marks and capitals, in their own times. None: as it is.
    last: the word that was spoken before it, without marks."""
    if punctuation is None:
        return result
    written = punctuate_words(punctuation, [word.text for word in result.words])
    sentences: list[Sentence] = []
    words: list[Word] = []
    for i, (word, new) in enumerate(zip(result.words, written, strict=True)):
        apart = word.spaced and not (is_ideograph(last[-1:]) or is_ideograph(word.text[:1]))    # accents are no ASCII
        words.append(word._replace(text=new.text, spaced=apart or i > 0 and new.spaced))
        last = word.text
        if new.ends_sentence or i == len(written) - 1:
            sentences.append(Sentence(join_words(words), words[0].start, word.end, words))
            words = []
    return result._replace(sentences=tuple(sentences))
