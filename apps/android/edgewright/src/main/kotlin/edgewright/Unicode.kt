package edgewright

/** Code points in ranges, by tables of the app's own: a phone's Unicode is as old as its Android. */
internal class CharSet(table: String) {
    private val firsts: IntArray
    private val lasts: IntArray

    init {
        val ranges = table.trim().split(' ').map { range -> range.split('-').map { it.toInt(16) } }
        firsts = IntArray(ranges.size) { ranges[it][0] }
        lasts = IntArray(ranges.size) { ranges[it].last() }
    }

    operator fun contains(c: Int): Boolean {
        val found = firsts.binarySearch(c)
        return found >= 0 || (found < -1 && c <= lasts[-found - 2])
    }
}

internal fun isSpace(c: Int): Boolean =
    c in 9..13 || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 || c in 0x2000..0x200A || c == 0x2028 || c == 0x2029 ||
        c == 0x202F || c == 0x205F || c == 0x3000

internal fun isSpace(c: Char): Boolean = isSpace(c.code)

internal fun isWord(c: Int): Boolean = c in LETTERS || c in MARKS || c in DIGITS || c in CONNECTORS

internal fun isPunctuation(c: Int): Boolean = c in 0x21..0x2F || c in 0x3A..0x40 || c in 0x5B..0x60 || c in 0x7B..0x7E || c in PUNCTUATION

/** The text with U+FFFD in place of each half of a pair that stands alone, as UTF-8 has none. */
internal fun wellFormed(text: String): String {
    val whole = { i: Int ->
        when {
            text[i].isHighSurrogate() -> i + 1 < text.length && text[i + 1].isLowSurrogate()
            text[i].isLowSurrogate() -> i > 0 && text[i - 1].isHighSurrogate()
            else -> true
        }
    }
    if (text.indices.all(whole)) return text
    return String(CharArray(text.length) { if (whole(it)) text[it] else '\uFFFD' })
}

/** The text of UTF-8; each longest part that is none is one U+FFFD, as Unicode recommends. null for none where `strict`. */
internal fun textOf(bytes: ByteArray, strict: Boolean = false): String? {
    val out = StringBuilder()
    var at = 0
    while (at < bytes.size) {
        val first = bytes[at++].toInt() and 0xFF
        if (first < 0x80) {
            out.append(first.toChar())
            continue
        }
        val more = if (first in 0xC2..0xDF) {
            1
        } else if (first in 0xE0..0xEF) {
            2
        } else if (first in 0xF0..0xF4) {
            3
        } else {
            0
        }
        var low = if (first == 0xE0) {
            0xA0
        } else if (first == 0xF0) {
            0x90
        } else {
            0x80
        }
        var high = if (first == 0xED) {
            0x9F
        } else if (first == 0xF4) {
            0x8F
        } else {
            0xBF
        }
        var value = first and (0x3F shr more)
        var read = 0
        while (read < more && at < bytes.size && (bytes[at].toInt() and 0xFF) in low..high) {
            value = (value shl 6) or (bytes[at++].toInt() and 0x3F)
            low = 0x80
            high = 0xBF
            read++
        }
        val good = more > 0 && read == more
        if (!good && strict) return null
        out.appendCodePoint(if (good) value else 0xFFFD)
    }
    return out.toString()
}

/** A part of a text, and whether a pattern matched it. */
internal class Span(val begin: Int, val end: Int, val match: Boolean)

/** Spans that cover a text, joined and cut as a "behavior" of the tokenizers library says. */
internal fun cut(text: String, spans: List<Span>, behavior: String): List<String> {
    val kept = mutableListOf<Span>()
    for (span in spans) {
        if (span.begin == span.end) continue
        val before = kept.lastOrNull()
        val joined =
            when (behavior) {
                "Removed", "Isolated" -> null
                "Contiguous" -> before?.takeIf { it.match == span.match }?.let { Span(it.begin, span.end, it.match) }
                "MergedWithPrevious" -> before?.takeIf { span.match && !it.match }?.let { Span(it.begin, span.end, true) }
                "MergedWithNext" -> before?.takeIf { !span.match && it.match }?.let { Span(it.begin, span.end, false) }
                else -> unknownPart("the behavior $behavior")
            }
        if (joined != null) {
            kept[kept.size - 1] = joined
        } else if (behavior != "Removed" || !span.match) {
            kept += span
        }
    }
    return kept.map { text.substring(it.begin, it.end) }
}

/** The characters that a test holds for, each a match, and what is between them. */
internal inline fun spansWhere(text: String, test: (Int) -> Boolean): List<Span> {
    val spans = mutableListOf<Span>()
    var from = 0
    var at = 0
    while (at < text.length) {
        val c = text.codePointAt(at)
        val end = at + Character.charCount(c)
        if (test(c)) {
            spans += Span(from, at, false)
            spans += Span(at, end, true)
            from = end
        }
        at = end
    }
    return spans + Span(from, text.length, false)
}

/** Where a text has another, and what is between. */
internal fun spansOf(text: String, wanted: String): List<Span> {
    val spans = mutableListOf<Span>()
    var from = 0
    var at = if (wanted.isEmpty()) -1 else text.indexOf(wanted)
    while (at >= 0) {
        spans += Span(from, at, false)
        from = at + wanted.length
        spans += Span(at, from, true)
        at = text.indexOf(wanted, from)
    }
    return spans + Span(from, text.length, false)
}

internal fun unknownPart(what: String): Nothing =
    fail("tokenizer.json has $what, which this client does not know; embed the bundle again with this version")
