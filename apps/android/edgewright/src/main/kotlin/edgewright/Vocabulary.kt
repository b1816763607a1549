package edgewright

import java.util.PriorityQueue

/** The model of a tokenizer: a word, as the steps before have cut it, to tokens. */
internal sealed class Vocabulary(protected val words: Map<String, Int>, protected val unknown: Int?, private val byteFallback: Boolean) {
    private val spellings = arrayOfNulls<String>((words.values.maxOrNull() ?: -1) + 1).also { for ((word, id) in words) it[id] = word }

    fun spelling(id: Int): String? = spellings.getOrNull(id)

    abstract fun add(word: String, ids: IntList)

    /** Adds the `<0x..>` tokens of a text's bytes; false, and nothing, where they are not used or one is missing. */
    protected fun addBytes(text: String, ids: IntList): Boolean {
        if (!byteFallback) return false
        val found = text.toByteArray().map { words["<0x%02X>".format(it)] ?: return false }
        found.forEach(ids::add)
        return true
    }
}

internal class WordLevel(words: Map<String, Int>, unknown: Int?) : Vocabulary(words, unknown, false) {
    override fun add(word: String, ids: IntList) {
        (words[word] ?: unknown)?.let(ids::add)
    }
}

/** Pairs of tokens -> (rank, the token that they make), in arrays: half a million of them are on a phone's heap. */
internal class Merges(count: Int) {
    private val mask = Integer.highestOneBit(maxOf(8, count)) * 4 - 1
    private val keys = LongArray(mask + 1) { EMPTY }
    private val ranks = IntArray(mask + 1)
    private val made = IntArray(mask + 1)

    fun put(left: Int, right: Int, rank: Int, makes: Int) {
        val at = place(key(left, right))
        keys[at] = key(left, right)
        ranks[at] = rank
        made[at] = makes
    }

    /** Where a pair is, or -1. */
    fun find(left: Int, right: Int): Int = place(key(left, right)).let { if (keys[it] == EMPTY) -1 else it }

    fun rank(at: Int) = ranks[at]

    fun made(at: Int) = made[at]

    private fun key(left: Int, right: Int) = (left.toLong() shl 32) or right.toLong()

    private fun place(key: Long): Int {
        val mixed = key * -0x61c8864680b583ebL
        var at = (mixed ushr 32).toInt() and mask
        while (keys[at] != EMPTY && keys[at] != key) at = (at + 1) and mask
        return at
    }

    private companion object {
        const val EMPTY = -1L
    }
}

internal class BytePairs(
    words: Map<String, Int>,
    unknown: Int?,
    byteFallback: Boolean,
    private val merges: Merges,
    private val fuseUnknown: Boolean,
    private val ignoreMerges: Boolean,
) : Vocabulary(words, unknown, byteFallback) {
    private class Candidate(val rank: Int, val at: Int, val right: Int, val a: Int, val b: Int, val made: Int) : Comparable<Candidate> {
        override fun compareTo(other: Candidate) = compareValuesBy(this, other, { it.rank }, { it.at })
    }

    override fun add(word: String, ids: IntList) {
        val whole = if (ignoreMerges) words[word] else null
        if (whole != null) ids.add(whole) else ids.add(merged(symbols(word)))
    }

    private fun symbols(word: String): IntArray {
        val symbols = IntList()
        var afterUnknown = false
        var at = 0
        while (at < word.length) {
            val end = at + Character.charCount(word.codePointAt(at))
            val text = word.substring(at, end)
            at = end
            val known = words[text]
            if (known != null) {
                symbols.add(known)
            } else if (!addBytes(text, symbols) && unknown != null) {
                if (!(fuseUnknown && afterUnknown)) symbols.add(unknown)
                afterUnknown = true
                continue
            }
            afterUnknown = false
        }
        return symbols.toArray()
    }

    /** The pair of the lowest rank is merged, the leftmost of equals, until no pair is left. */
    private fun merged(symbols: IntArray): IntArray {
        val none = symbols.size
        val before = IntArray(none) { it - 1 }
        val after = IntArray(none) { it + 1 }
        val gone = BooleanArray(none)
        val queue = PriorityQueue<Candidate>()

        fun consider(at: Int) {
            if (at < 0 || after[at] == none) return
            val right = after[at]
            val found = merges.find(symbols[at], symbols[right])
            if (found >= 0) queue += Candidate(merges.rank(found), at, right, symbols[at], symbols[right], merges.made(found))
        }
        symbols.indices.forEach(::consider)
        while (true) {
            val best = queue.poll() ?: break
            if (gone[best.at] || gone[best.right] || after[best.at] != best.right) continue
            if (symbols[best.at] != best.a || symbols[best.right] != best.b) continue
            symbols[best.at] = best.made
            gone[best.right] = true
            after[best.at] = after[best.right]
            if (after[best.at] != none) before[after[best.at]] = best.at
            consider(best.at)
            consider(before[best.at])
        }
        return symbols.filterIndexed { i, _ -> !gone[i] }.toIntArray()
    }
}

internal class Unigram(words: Map<String, Int>, unknown: Int?, byteFallback: Boolean, private val scores: DoubleArray) :
    Vocabulary(words, unknown, byteFallback) {
    private val least = minOf(0.0, scores.minOrNull() ?: 0.0)
    private val longest = words.keys.maxOfOrNull { it.length } ?: 0

    /** The pieces whose scores add up to most (Viterbi); a character in no piece scores 10 below the least. */
    override fun add(word: String, ids: IntList) {
        val best = DoubleArray(word.length + 1) { Double.NEGATIVE_INFINITY }
        val from = IntArray(word.length + 1)
        val known = BooleanArray(word.length + 1)
        best[0] = 0.0

        fun reach(end: Int, begin: Int, score: Double, inVocabulary: Boolean) {
            if (score <= best[end]) return
            best[end] = score
            from[end] = begin
            known[end] = inVocabulary
        }
        var at = 0
        while (at < word.length) {
            val next = at + Character.charCount(word.codePointAt(at))
            var single = false
            var end = next
            while (end <= word.length && end - at <= longest) {
                val found = words[word.substring(at, end)]
                if (found != null) {
                    single = single || end == next
                    reach(end, at, best[at] + scores[found], true)
                }
                if (end == word.length) break
                end += Character.charCount(word.codePointAt(end))
            }
            if (!single) reach(next, at, best[at] + least - UNKNOWN_COST, false)
            at = next
        }
        pieces(word, from, known).forEach { addPiece(it, ids) }
    }

    private fun pieces(word: String, from: IntArray, known: BooleanArray): List<String> {
        val pieces = mutableListOf<String>()
        var joins = false
        var end = word.length
        while (end > 0) {
            val piece = word.substring(from[end], end)
            if (!known[end] && joins) pieces[pieces.size - 1] = piece + pieces.last() else pieces += piece // what is unknown is one piece
            joins = !known[end]
            end = from[end]
        }
        return pieces.asReversed()
    }

    private fun addPiece(piece: String, ids: IntList) {
        val found = words[piece]
        if (found != null) {
            ids.add(found)
        } else if (!addBytes(piece, ids)) {
            unknown?.let(ids::add)
        }
    }

    private companion object {
        const val UNKNOWN_COST = 10
    }
}

/** The "model" of a tokenizer.json, read as it comes. */
internal class VocabularyReader(private val json: JsonReader) {
    private val words = HashMap<String, Int>()
    private val scores = mutableListOf<Double>()
    private val merges = mutableListOf<String>() // left, right, left, right: each string is the vocabulary's own
    private val own = HashMap<String, String>()
    private val facts = mutableMapOf<String, Any?>()

    fun read(): Vocabulary {
        json.members { name ->
            when (name) {
                "vocab" -> if (json.peek() == '{') readWords() else readScores()
                "merges" -> json.elements { readMerge() }
                else -> facts[name] = json.value()
            }
        }
        own.clear()
        val fields = Fields(facts, "tokenizer.json: model")
        return when (val kind = fields.text("type")) {
            "WordLevel" -> WordLevel(words, words[fields.text("unk_token", "")])
            "BPE" -> bytePairs(fields)
            "Unigram" -> Unigram(words, fields.orNull("unk_id") { int(it) }, fields.flag("byte_fallback", false), scores.toDoubleArray())
            else -> unknownPart("a model of the kind $kind")
        }
    }

    private fun readWords() = json.members { word ->
        words[word] = (json.value() as? Long)?.takeIf { it in 0..MOST_TOKENS }?.toInt() ?: unknownPart("a token without an id")
        own[word] = word
    }

    private fun readScores() = json.elements {
        val (word, score) = json.value() as? List<*> ?: unknownPart("a piece without a score")
        words[word as String] = scores.size
        scores += (score as Number).toDouble()
    }

    private fun readMerge() {
        val pair = json.value()
        val (left, right) = if (pair is String) pair.split(' ', limit = 2) else pair as List<*>
        for (part in listOf(left as String, right as String)) merges += own[part] ?: part
    }

    private fun bytePairs(fields: Fields): BytePairs {
        for (key in listOf("continuing_subword_prefix", "end_of_word_suffix")) {
            if (fields.text(key, "").isNotEmpty()) unknownPart(key)
        }
        val ranked = Merges(merges.size / 2)
        for (rank in 0 until merges.size / 2) {
            val (left, right) = merges.subList(2 * rank, 2 * rank + 2)
            val broken = "tokenizer.json: a merge makes what is not in its vocabulary; copy the file again"
            ranked.put(words[left] ?: fail(broken), words[right] ?: fail(broken), rank, words[left + right] ?: fail(broken))
        }
        return BytePairs(
            words,
            words[fields.text("unk_token", "")],
            fields.flag("byte_fallback", false),
            ranked,
            fields.flag("fuse_unk", false),
            fields.flag("ignore_merges", false),
        )
    }

    private companion object {
        const val MOST_TOKENS = 1L shl 24
    }
}
