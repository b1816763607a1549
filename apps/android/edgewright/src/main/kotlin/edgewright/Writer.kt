package edgewright

/** The text of tokens as they come, up to a stop string; half a character, and what may become a stop string, is held back. */
internal class Writer(private val tokenizer: Tokenizer?, private val stops: List<String>) {
    private val ids = IntList()
    private var from = 0
    private var shown = 0
    private var held = ""

    var stopped = false
        private set

    fun put(token: Int): String {
        ids.add(token)
        val piece = fresh()
        if (piece.isEmpty() || piece.endsWith(REPLACEMENT)) return ""
        from = shown
        shown = ids.size
        return show(piece, last = false)
    }

    fun end(): String = if (stopped) "" else show(fresh(), last = true)

    private fun fresh(): String {
        if (tokenizer == null) return ""
        val all = ids.toArray(from)
        val known = tokenizer.decode(all.copyOf(shown - from))
        return tokenizer.decode(all).drop(known.length)
    }

    private fun show(piece: String, last: Boolean): String {
        held += piece
        val cut = stops.map { held.indexOf(it) }.filter { it >= 0 }.minOrNull()
        stopped = cut != null
        val kept = if (last) {
            0
        } else {
            stops.maxOfOrNull { stop -> (stop.length - 1 downTo 1).firstOrNull { held.endsWith(stop.take(it)) } ?: 0 }
                ?: 0
        }
        val size = cut ?: (held.length - kept)
        return held.take(size).also { held = held.drop(size) }
    }

    private companion object {
        const val REPLACEMENT = '\uFFFD'
    }
}
