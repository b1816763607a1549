package edgewright

import java.io.File

/** What goes in or out of a graph; a size of the shape is a number or a name. */
internal class Port(val name: String, val dtype: String, private val shape: List<Any?>, val kv: Boolean, val updated: Boolean) {
    /** The shape where the named sizes but the batch are `size`. */
    fun sized(size: Int): LongArray = shape.map { it as? Long ?: if (it == "batch") 1L else size.toLong() }.toLongArray()
}

internal class GraphSpec(
    val name: String,
    val file: String,
    val inputs: List<Port>,
    val outputs: List<Port>,
    val states: List<Port>,
    val oldestRuntime: String,
)

internal class ContextSpec(
    val window: Int,
    val hidden: Int,
    val rows: Int,
    val vocab: Int,
    val tokens: IntArray,
    val prefix: IntArray,
    val released: Boolean,
)

internal class ChatSpec(val before: String?, val after: String, val trims: Boolean)

internal class TokenizerSpec(val file: String, val before: IntArray, val after: IntArray, val bos: Int?)

/** A file of the app. */
class FileFact(val bytes: Long, val sha256: String)

/** How a token is drawn. temperature 0: the best one. */
data class Sampling(
    val temperature: Double = 0.0,
    val topP: Double = 1.0,
    val minP: Double = 0.0,
    val topK: Int = 0,
    val repetitionPenalty: Double = 1.0,
    val noRepeatNgram: Int = 0,
    val seed: Long? = null,
)

/** `app.json`: what the model is, what its files are, what it needs. */
class App internal constructor(fields: Fields) {
    val name = fields.text("name")
    val task = fields.text("task")
    val fingerprint = fields.text("fingerprint")
    val vocab = fields.int("vocab")
    val maxContext = fields.int("max_context")
    val maxNewTokens = fields.int("max_new_tokens")

    /** Bytes of weights and of one answer's states. */
    val memoryBytes = fields.fields("memory").long("total")
    val sampling = sampling(fields.fields("sampling"))
    val files: Map<String, FileFact> = fields.fields("files").let { all -> all.names.associateWith { fact(all.fields(it)) } }

    internal val stopTokens = fields.fields("stops").ints("tokens").toSet()
    internal val stopStrings = fields.fields("stops").texts("strings")
    internal val chunk = fields.int("prefill_chunk").coerceAtLeast(1)
    internal val forced = fields.ints("forced")
    internal val decoderStart = fields.orNull("decoder_start") { int(it) }
    internal val graphs = fields.all("graphs").map(::graph)
    internal val context = fields.orNull("context") { context(fields(it)) }
    internal val chat = fields.orNull("chat") { chat(fields(it)) }
    internal val tokenizer = fields.orNull("tokenizer") { tokenizer(fields(it)) }

    /** Whether it takes and gives text; without a tokenizer, token ids alone. */
    val readsText get() = tokenizer != null

    companion object {
        const val FILE = "app.json"

        /** The contract in a folder. Throws EdgewrightException. */
        fun read(folder: File): App {
            val fields = JsonReader.fields(File(folder, FILE))
            if (fields.long("schema_version") != 1L) fail("$FILE is of another version; embed the bundle again, or build this client anew")
            return App(fields)
        }

        private fun fact(fields: Fields) = FileFact(fields.long("bytes"), fields.text("sha256"))

        private fun sampling(fields: Fields) = Sampling(
            fields.number("temperature"),
            fields.number("top_p"),
            fields.number("min_p"),
            fields.int("top_k"),
            fields.number("repetition_penalty"),
            fields.int("no_repeat_ngram"),
        )

        private fun ports(all: List<Fields>) = all.map {
            Port(it.text("name"), it.text("dtype"), it.list("shape"), it.text("kind", "") == "kv", it.flag("updated", false))
        }

        private fun graph(fields: Fields) = GraphSpec(
            fields.text("name"),
            fields.text("file"),
            ports(fields.all("inputs")),
            ports(fields.all("outputs")),
            ports(fields.all("states")),
            fields.text("onnxruntime"),
        )

        private fun context(fields: Fields) = ContextSpec(
            fields.int("window").coerceAtLeast(1),
            fields.int("hidden").coerceAtLeast(1),
            fields.int("rows"),
            fields.int("vocab"),
            fields.ints("tokens"),
            fields.ints("prefix"),
            fields.text("splice") == "released",
        )

        private fun chat(fields: Fields) = ChatSpec(fields.orNull("before") { text(it) }, fields.text("after", ""), fields.flag("trims"))

        private fun tokenizer(fields: Fields) =
            TokenizerSpec(fields.text("file"), fields.ints("before"), fields.ints("after"), fields.orNull("bos") { int(it) })
    }
}
