package edgewright

import java.io.ByteArrayOutputStream
import java.text.Normalizer

// The steps of a tokenizer.json, each made a function once.

/** A byte as the printable character that byte-level vocabularies write it as. */
private val CHAR_OF_BYTE: CharArray =
    CharArray(256).also { chars ->
        var next = 256
        for (byte in 0..255) chars[byte] = if (byte in 33..126 || byte in 161..172 || byte >= 174) byte.toChar() else (next++).toChar()
    }

private val BYTE_OF_CHAR: Map<Char, Byte> = CHAR_OF_BYTE.withIndex().associate { (byte, char) -> char to byte.toByte() }

private fun literal(step: Fields, kind: String): String {
    val pattern = step.fields("pattern")
    return if (pattern.has("String")) pattern.text("String") else unknownPart("a regular expression in $kind")
}

internal fun normalizersOf(steps: List<Fields>): List<(String) -> String> = steps.map { step ->
    when (val kind = step.text("type")) {
        "NFC" -> { text -> Normalizer.normalize(text, Normalizer.Form.NFC) }
        "Prepend" -> step.text("prepend").let { first -> { text -> if (text.isEmpty()) text else first + text } }
        "Replace" -> replacing(literal(step, kind), step.text("content"))
        else -> unknownPart("the normalizer $kind")
    }
}

private fun replacing(from: String, to: String): (String) -> String = { if (from.isEmpty()) it else it.replace(from, to) }

/** Each cuts a part that is not empty; it is told whether that begins the text. */
internal fun splittersOf(steps: List<Fields>): List<(String, Boolean) -> List<String>> = steps.map { step ->
    when (val kind = step.text("type")) {
        "WhitespaceSplit" -> { text, _ -> cut(text, spansWhere(text, ::isSpace), "Removed") }

        "Punctuation" -> step.text("behavior", "Isolated").let { how ->
            { text, _ -> cut(text, spansWhere(text, ::isPunctuation), how) }
        }

        "Digits" -> digits(if (step.flag("individual_digits", false)) "Isolated" else "Contiguous")

        "Metaspace" -> metaspace(step)

        "ByteLevel" -> byteLevel(step)

        "Split" -> splitting(step)

        else -> unknownPart("the pre-tokenizer $kind")
    }
}

private fun digits(how: String): (String, Boolean) -> List<String> = { text, _ -> cut(text, spansWhere(text) { it in NUMBERS }, how) }

private fun metaspace(step: Fields): (String, Boolean) -> List<String> {
    val mark = step.text("replacement")
    val scheme = step.text("prepend_scheme", "always")
    val splits = step.flag("split", true)
    val sign = mark.codePointAt(0)
    return { text, first ->
        val spaced = text.replace(" ", mark)
        val wanted = scheme == "always" || (scheme == "first" && first)
        val whole = if (wanted && !spaced.startsWith(mark)) mark + spaced else spaced
        if (splits) cut(whole, spansWhere(whole) { it == sign }, "MergedWithNext") else listOf(whole)
    }
}

private fun byteLevel(step: Fields): (String, Boolean) -> List<String> {
    val spaced = step.flag("add_prefix_space", true)
    val patterned = step.flag("use_regex", true)
    return { text, _ ->
        val whole = if (spaced && !text.startsWith(" ")) " $text" else text
        val parts = if (patterned) cut(whole, Pattern.gpt2.spans(whole), "Isolated") else listOf(whole)
        parts.map { part -> part.toByteArray().let { bytes -> String(CharArray(bytes.size) { CHAR_OF_BYTE[bytes[it].toInt() and 0xFF] }) } }
    }
}

private fun splitting(step: Fields): (String, Boolean) -> List<String> {
    val pattern = step.fields("pattern")
    val regex = if (pattern.has("Regex")) Pattern(pattern.text("Regex")) else null
    val wanted = if (regex == null) pattern.text("String") else ""
    val how = step.text("behavior", "Isolated")
    val inverted = step.flag("invert", false)
    return { text, _ ->
        val spans = regex?.spans(text) ?: spansOf(text, wanted)
        cut(text, if (inverted) spans.map { Span(it.begin, it.end, !it.match) } else spans, how)
    }
}

internal fun decodersOf(steps: List<Fields>): List<(List<String>) -> List<String>> = steps.map { step ->
    when (val kind = step.text("type")) {
        "Metaspace" -> marksToSpaces(step.text("replacement"), step.text("prepend_scheme", "always") != "never")
        "ByteLevel" -> ::bytesOfChars
        "ByteFallback" -> ::bytesJoined
        "Replace" -> replacing(literal(step, kind), step.text("content")).let { replace -> { parts -> parts.map(replace) } }
        "Fuse" -> { parts -> listOf(parts.joinToString("")) }
        "Strip" -> stripping(step.text("content"), step.int("start"), step.int("stop"))
        else -> unknownPart("the decoder $kind")
    }
}

private fun marksToSpaces(mark: String, drops: Boolean): (List<String>) -> List<String> =
    { parts -> parts.mapIndexed { i, part -> part.replace(mark, if (i == 0 && drops) "" else " ") } }

private fun stripping(mark: String, start: Int, stop: Int): (List<String>) -> List<String> = { parts ->
    parts.map { part ->
        var text = part
        repeat(start) { text = text.removePrefix(mark) }
        repeat(stop) { text = text.removeSuffix(mark) }
        text
    }
}

private fun bytesOfChars(parts: List<String>): List<String> {
    val bytes = ByteArrayOutputStream()
    for (part in parts) {
        val own = part.map { BYTE_OF_CHAR[it] }
        bytes.write(if (null in own) part.toByteArray() else ByteArray(own.size) { own[it] ?: 0 })
    }
    return listOf(textOf(bytes.toByteArray()).orEmpty())
}

/** Runs of <0x..> tokens as the text of their bytes; one U+FFFD a token where that is no UTF-8. */
private fun bytesJoined(parts: List<String>): List<String> {
    val out = mutableListOf<String>()
    val run = ByteArrayOutputStream()

    fun flush() {
        val text = textOf(run.toByteArray(), strict = true)
        if (text == null) {
            repeat(run.size()) { out += "\uFFFD" }
        } else if (text.isNotEmpty()) {
            out += text
        }
        run.reset()
    }
    for (part in parts) {
        val byte = if (part.length == 6 && part.startsWith("<0x") && part.endsWith(">")) part.substring(3, 5).toIntOrNull(16) else null
        if (byte != null) {
            run.write(byte)
        } else {
            flush()
            out += part
        }
    }
    flush()
    return out
}
