package edgewright

/**
 * Regular expressions, as far as pre-tokenizers use them: alternatives, groups (?:…) and (?i:…), look-aheads (?=…) and (?!…), classes
 * with \s \S \d \w \p{L} \p{N} \p{M} \p{P}, and greedy ? * + {m,n}, also possessive. The first alternative that fits wins. Android's
 * own expressions are another engine than a desktop's, with another Unicode.
 */
internal class Pattern(private val text: String) {
    private sealed interface Node

    private class OneOf(val items: List<Item>, val negated: Boolean, val fold: Boolean) : Node

    private class Sequence(val parts: List<Node>) : Node

    private class Choice(val parts: List<Node>) : Node

    private class Repeat(val inner: Node, val least: Int, val most: Int, val possessive: Boolean) : Node

    private class Ahead(val inner: Node, val negated: Boolean) : Node

    private class Item(val first: Int, var last: Int = first, val category: Char? = null, val negated: Boolean = false)

    private var at = 0
    private val root = alternatives(false)

    init {
        if (at != text.length) refuse()
    }

    /** The matches from left to right, and what is between them. */
    fun spans(of: String): List<Span> {
        val spans = mutableListOf<Span>()
        var from = 0
        var begin = 0
        while (begin < of.length) {
            var end = begin
            val found =
                match(root, of, begin) {
                    end = it
                    true
                }
            if (!found || end == begin) {
                begin += Character.charCount(of.codePointAt(begin))
                continue
            }
            spans += Span(from, begin, false)
            spans += Span(begin, end, true)
            begin = end
            from = end
        }
        return spans + Span(from, of.length, false)
    }

    private fun refuse(): Nothing = fail("tokenizer.json: this client does not know the regular expression $text; embed the bundle again")

    private fun take(wanted: String): Boolean = text.startsWith(wanted, at).also { if (it) at += wanted.length }

    private fun ahead(): Char = if (at < text.length) text[at] else refuse()

    private fun alternatives(fold: Boolean): Node {
        val parts = mutableListOf<Node>()
        do {
            val sequence = mutableListOf<Node>()
            while (at < text.length && text[at] != '|' && text[at] != ')') sequence += repeated(fold)
            parts += Sequence(sequence)
        } while (take("|"))
        return Choice(parts)
    }

    private fun repeated(fold: Boolean): Node {
        val inner = atom(fold)
        val (least, most) =
            when {
                take("?") -> 0 to 1
                take("*") -> 0 to Int.MAX_VALUE
                take("+") -> 1 to Int.MAX_VALUE
                take("{") -> bounds()
                else -> return inner
            }
        val possessive = take("+")
        if (take("?")) refuse() // lazy
        return Repeat(inner, least, most, possessive)
    }

    private fun bounds(): Pair<Int, Int> {
        val least = number()
        val most = if (!take(",")) {
            least
        } else if (ahead() == '}') {
            Int.MAX_VALUE
        } else {
            number()
        }
        if (!take("}")) refuse()
        return least to most
    }

    private fun number(): Int {
        val from = at
        while (at < text.length && text[at] in '0'..'9') at++
        return text.substring(from, at).toIntOrNull()?.takeIf { it < 1000 } ?: refuse()
    }

    private fun atom(fold: Boolean): Node {
        if (take("(?!") || take("(?=")) {
            val negated = text[at - 1] == '!'
            return Ahead(alternatives(fold), negated).also { if (!take(")")) refuse() }
        }
        val insensitive = take("(?i:")
        if (insensitive || take("(?:") || take("(")) {
            if (ahead() == '?') refuse()
            return alternatives(fold || insensitive).also { if (!take(")")) refuse() }
        }
        if (take("[")) return bracket(fold)
        if (ahead() in "^$.") refuse()
        return OneOf(listOf(member()), false, fold)
    }

    private fun bracket(fold: Boolean): Node {
        val negated = take("^")
        val items = mutableListOf<Item>()
        while (ahead() != ']') {
            val item = member()
            if (item.category == null && ahead() == '-' && text.getOrNull(at + 1) != ']') {
                at++
                item.last = member().first
            }
            items += item
        }
        at++
        return OneOf(items, negated, fold)
    }

    private fun member(): Item {
        if (!take("\\")) {
            ahead()
            return Item(text.codePointAt(at)).also { at += Character.charCount(it.first) }
        }
        val c = ahead()
        at++
        return when (c) {
            'r' -> Item('\r'.code)

            'n' -> Item('\n'.code)

            't' -> Item('\t'.code)

            's', 'S', 'd', 'D', 'w', 'W' -> Item(0, category = c.lowercaseChar(), negated = c.isUpperCase())

            'p', 'P' -> {
                val category = "LNMP".firstOrNull { take("{$it}") } ?: refuse()
                Item(0, category = category, negated = c == 'P')
            }

            else -> if (c.isLetterOrDigit() || c.isSurrogate()) refuse() else Item(c.code)
        }
    }

    private fun inCategory(c: Int, category: Char): Boolean = when (category) {
        's' -> isSpace(c)
        'd' -> c in DIGITS
        'w' -> isWord(c)
        'L' -> c in LETTERS
        'N' -> c in NUMBERS
        'M' -> c in MARKS
        else -> c in PUNCTUATION
    }

    private fun plainly(node: OneOf, c: Int): Boolean =
        node.items.any { if (it.category != null) inCategory(c, it.category) != it.negated else c in it.first..it.last }

    private fun fits(node: OneOf, c: Int): Boolean {
        var found = plainly(node, c)
        if (!found && node.fold) {
            found =
                when (c) {
                    in 'a'.code..'z'.code -> plainly(node, c - 32)
                    in 'A'.code..'Z'.code -> plainly(node, c + 32)
                    0x17F -> plainly(node, 's'.code) || plainly(node, 'S'.code)
                    0x212A -> plainly(node, 'k'.code) || plainly(node, 'K'.code)
                    else -> false
                }
        }
        return found != node.negated
    }

    private fun match(node: Node, of: String, from: Int, then: (Int) -> Boolean): Boolean = when (node) {
        is OneOf -> from < of.length && of.codePointAt(from).let { fits(node, it) && then(from + Character.charCount(it)) }
        is Sequence -> inTurn(node, 0, of, from, then)
        is Choice -> node.parts.any { match(it, of, from, then) }
        is Ahead -> match(node.inner, of, from) { true } != node.negated && then(from)
        is Repeat -> if (node.inner is OneOf) again(node, node.inner, of, from, then) else groupAgain(node, of, from, 0, then)
    }

    private fun inTurn(node: Sequence, i: Int, of: String, from: Int, then: (Int) -> Boolean): Boolean =
        if (i == node.parts.size) then(from) else match(node.parts[i], of, from) { inTurn(node, i + 1, of, it, then) }

    /** Classes are counted in a loop, so that a long run takes no stack; groups go back one by one. */
    private fun again(node: Repeat, inner: OneOf, of: String, from: Int, then: (Int) -> Boolean): Boolean {
        var count = 0
        var end = from
        while (count < node.most && end < of.length) {
            val c = of.codePointAt(end)
            if (!fits(inner, c)) break
            end += Character.charCount(c)
            count++
        }
        if (count < node.least) return false
        if (node.possessive) return then(end)
        while (true) {
            if (then(end)) return true
            if (count-- == node.least) return false
            end -= Character.charCount(of.codePointBefore(end))
        }
    }

    private fun groupAgain(node: Repeat, of: String, from: Int, count: Int, then: (Int) -> Boolean): Boolean {
        if (count < node.most && count < MOST_GROUPS) {
            if (match(node.inner, of, from) { it != from && groupAgain(node, of, it, count + 1, then) }) return true
        }
        return count >= node.least && then(from)
    }

    companion object {
        private const val MOST_GROUPS = 1000

        /** GPT-2's, which "ByteLevel" stands for. */
        val gpt2 by lazy { Pattern("""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""") }
    }
}
