package edgewright

import java.io.File

/** A token that was added to a vocabulary, which no step touches. */
internal class Added(
    val content: String,
    val id: Int,
    val singleWord: Boolean,
    val left: Boolean,
    val right: Boolean,
    val special: Boolean,
    val normalized: Boolean,
)

/** tokenizer.json: text to tokens and back. Steps that are not known here are refused when the file is opened. */
internal class Tokenizer private constructor(private val model: Vocabulary, added: List<Added>, steps: Map<String, Any?>, file: String) {
    /** first: at the very start of the text. id: of an added token. */
    private class Piece(val text: String, val first: Boolean, val id: Int? = null)

    private val normalizer = normalizersOf(stepsOf(steps["normalizer"], "normalizers", file))
    private val splitter = splittersOf(stepsOf(steps["pre_tokenizer"], "pretokenizers", file))
    private val decoder = decodersOf(stepsOf(steps["decoder"], "decoders", file))
    private val special = added.filter { it.special }.map { it.id }.toSet()
    private val raw = byFirst(added.filter { !it.normalized }.map { it.content to it })
    private val normalized = byFirst(added.filter { it.normalized }.map { normalize(it.content) to it })
    private val spelling = added.associate { it.id to if (it.normalized) normalize(it.content) else it.content }

    fun encode(text: String): IntArray {
        val ids = IntList()
        for (piece in extract(Piece(wellFormed(text), true), raw)) {
            if (piece.id != null) {
                ids.add(piece.id)
                continue
            }
            for (inner in extract(Piece(normalize(piece.text), piece.first), normalized)) {
                if (inner.id != null) ids.add(inner.id) else split(inner).forEach { model.add(it, ids) }
            }
        }
        return ids.toArray()
    }

    fun decode(ids: IntArray): String {
        var parts = ids.filter { it !in special }.mapNotNull { spelling[it] ?: model.spelling(it) }
        if (decoder.isEmpty()) return parts.joinToString(" ")
        for (step in decoder) parts = step(parts)
        return parts.joinToString("")
    }

    private fun normalize(text: String) = normalizer.fold(text) { now, step -> step(now) }

    private fun split(piece: Piece): List<String> {
        var parts = listOf(piece.text)
        for (step in splitter) {
            parts = parts.flatMapIndexed { i, part -> if (part.isEmpty()) emptyList() else step(part, piece.first && i == 0) }
        }
        return parts
    }

    /** The text cut at added tokens, leftmost first, the longest of those that begin there. */
    private fun extract(whole: Piece, tokens: Map<Char, List<Pair<String, Added>>>): List<Piece> {
        val pieces = mutableListOf<Piece>()
        val text = whole.text
        var from = 0
        var at = 0
        while (at < text.length) {
            val (content, best) = tokens[text[at]]?.firstOrNull { text.startsWith(it.first, at) } ?: (null to null)
            if (content == null || best == null) {
                at++
                continue
            }
            var begin = at
            var end = at + content.length
            at = end
            val inWord = (begin > 0 && isWord(text.codePointBefore(begin))) || (end < text.length && isWord(text.codePointAt(end)))
            if (best.singleWord && inWord) continue
            if (best.left) while (begin > from && isSpace(text[begin - 1])) begin--
            if (best.right) while (end < text.length && isSpace(text[end])) end++
            if (begin > from) pieces += Piece(text.substring(from, begin), whole.first && from == 0)
            pieces += Piece("", false, best.id)
            from = end
            at = end
        }
        if (from < text.length) pieces += Piece(text.substring(from), whole.first && from == 0)
        return pieces
    }

    companion object {
        /** Throws EdgewrightException for a file that is none, or has parts that are not known here. */
        fun read(file: File): Tokenizer {
            val steps = mutableMapOf<String, Any?>()
            val added = mutableListOf<Added>()
            var model: Vocabulary? = null
            JsonReader.reading(file) { json ->
                json.members { name ->
                    when (name) {
                        "model" -> model = VocabularyReader(json).read()
                        "added_tokens" -> json.elements { added += added(JsonReader.of(json.value(), file.path)) }
                        else -> steps[name] = json.value()
                    }
                }
            }
            val tokenizer = Tokenizer(model ?: unknownPart("no model"), added, steps, file.path)
            tokenizer.decode(tokenizer.encode("a")) // what is not known is refused now
            return tokenizer
        }

        private fun added(fields: Fields) = Added(
            fields.text("content"),
            fields.int("id"),
            fields.flag("single_word", false),
            fields.flag("lstrip", false),
            fields.flag("rstrip", false),
            fields.flag("special", false),
            fields.flag("normalized", true),
        )

        /** First character -> the tokens that begin with it, the longest first. */
        private fun byFirst(tokens: List<Pair<String, Added>>): Map<Char, List<Pair<String, Added>>> =
            tokens.filter { it.first.isNotEmpty() }.sortedByDescending { it.first.length }.groupBy { it.first[0] }

        private fun stepsOf(part: Any?, inner: String, file: String): List<Fields> {
            if (part == null) return emptyList()
            val step = JsonReader.of(part, file)
            return if (step.text("type") != "Sequence") listOf(step) else step.list(inner).flatMap { stepsOf(it, inner, file) }
        }
    }
}
