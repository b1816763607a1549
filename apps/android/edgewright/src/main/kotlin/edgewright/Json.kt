package edgewright

import java.io.File
import java.io.Reader

/** What went wrong, in one line that names the value and the way out. */
open class EdgewrightException(message: String, cause: Throwable? = null) : RuntimeException(message, cause)

/** A file of the model is not as app.json says. */
class DamagedFileException(val file: File, message: String) : EdgewrightException(message)

internal fun fail(line: String): Nothing = throw EdgewrightException(line)

/** JSON as it is read, without a tree of the whole: a tokenizer's file of 30 MB would not fit a phone's heap as one. */
internal class JsonReader(private val input: Reader, private val file: String) {
    private var next = -1
    private var ended = false
    private var depth = 0

    /** The next value: Map, List, String, Long, Double, Boolean or null. */
    fun value(): Any? = when (peek()) {
        '{' -> mutableMapOf<String, Any?>().also { map -> members { map[it] = value() } }
        '[' -> mutableListOf<Any?>().also { list -> elements { list += value() } }
        '"' -> text()
        else -> word()
    }

    /** Calls `each` with the name of every member; it must read the value. */
    fun members(each: (String) -> Unit) = nested('{', '}') {
        val name = text()
        take(':')
        each(name)
    }

    /** Calls `each` before every element; it must read it. */
    fun elements(each: () -> Unit) = nested('[', ']', each)

    private fun nested(open: Char, close: Char, each: () -> Unit) {
        if (++depth > DEEPEST) broken()
        take(open)
        if (peek() != close) {
            each()
            while (peek() == ',') {
                take(',')
                each()
            }
        }
        take(close)
        depth--
    }

    /** The next character that is no white space, still to be read. */
    fun peek(): Char {
        while (current() in " \t\r\n") next = -1
        return current()
    }

    fun text(): String {
        take('"')
        val out = StringBuilder()
        while (true) {
            val c = read()
            when {
                c == '"' -> return out.toString()
                c == '\\' -> out.append(escaped())
                c < ' ' -> broken()
                else -> out.append(c)
            }
        }
    }

    private fun escaped(): Char = when (val c = read()) {
        '"', '\\', '/' -> c
        'b' -> '\b'
        'f' -> '\u000C'
        'n' -> '\n'
        'r' -> '\r'
        't' -> '\t'
        'u' -> (1..4).fold(0) { code, _ -> 16 * code + Character.digit(read(), 16).also { if (it < 0) broken() } }.toChar()
        else -> broken()
    }

    private fun word(): Any? {
        val out = StringBuilder()
        peek()
        while (!atEnd() && (current().isLetterOrDigit() || current() in "+-.")) out.append(read())
        return when (val said = out.toString()) {
            "true" -> true
            "false" -> false
            "null" -> null
            else -> said.toLongOrNull() ?: said.toDoubleOrNull()?.takeIf { it.isFinite() } ?: broken()
        }
    }

    private fun take(wanted: Char) {
        if (peek() != wanted) broken()
        next = -1
    }

    private fun read(): Char = current().also { next = -1 }

    private fun atEnd(): Boolean {
        if (next < 0 && !ended) {
            next = input.read()
            ended = next < 0
        }
        return ended
    }

    private fun current(): Char = if (atEnd()) broken() else next.toChar()

    private fun broken(): Nothing = fail("$file is no JSON as it was written; copy the file again")

    companion object {
        private const val DEEPEST = 100

        fun <T> reading(file: File, read: (JsonReader) -> T): T {
            if (!file.isFile) fail("$file is missing; copy the whole folder that app.json lies in")
            return file.bufferedReader().use { read(JsonReader(it, file.path)) }
        }

        fun fields(file: File): Fields = reading(file) { of(it.value(), file.path) }

        fun of(value: Any?, where: String): Fields =
            if (value is Map<*, *>) Fields(value, where) else fail("$where is not as it was written; copy the folder again")
    }
}

/** A JSON object whose members are asked for by name and type. */
internal class Fields(private val map: Map<*, *>, private val where: String) {
    val names: List<String> get() = map.keys.map { it as String }

    fun has(name: String) = map[name] != null

    fun text(name: String) = map[name] as? String ?: wrong(name)

    fun text(name: String, otherwise: String) = if (has(name)) text(name) else otherwise

    fun long(name: String): Long = map[name] as? Long ?: wrong(name)

    fun int(name: String): Int = int(map[name], name)

    fun number(name: String): Double = (map[name] as? Number)?.toDouble() ?: wrong(name)

    fun flag(name: String, otherwise: Boolean? = null): Boolean = map[name] as? Boolean ?: otherwise.takeIf { !has(name) } ?: wrong(name)

    fun list(name: String): List<Any?> = map[name] as? List<*> ?: wrong(name)

    fun ints(name: String): IntArray = list(name).map { int(it, name) }.toIntArray()

    fun texts(name: String): List<String> = list(name).map { it as? String ?: wrong(name) }

    fun fields(name: String): Fields = JsonReader.of(map[name] ?: wrong(name), "$where: $name")

    fun all(name: String): List<Fields> = list(name).map { JsonReader.of(it, "$where: $name") }

    /** The value that `read` makes of a member, null where it is null or not there. */
    fun <T> orNull(name: String, read: Fields.(String) -> T): T? = if (has(name)) read(name) else null

    private fun int(value: Any?, name: String): Int = (value as? Long)?.takeIf { it in 0..Int.MAX_VALUE }?.toInt() ?: wrong(name)

    private fun wrong(name: String): Nothing =
        fail("$where: \"$name\" is ${map[name].toString().take(40)}, not as it was written; copy the folder again")
}
