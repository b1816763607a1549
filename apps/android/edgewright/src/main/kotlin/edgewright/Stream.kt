package edgewright

import ai.onnxruntime.OnnxTensor
import ai.onnxruntime.OrtSession
import java.nio.FloatBuffer
import java.nio.LongBuffer

/** What a decoder-decoder made of a context; it serves any number of prompts of the same model. rows: of `hidden` numbers. */
class ContextMemory internal constructor(val rows: Int, internal val values: FloatArray, val fingerprint: String)

internal fun requireTokens(ids: IntArray, vocab: Int, whose: String) {
    if (ids.isEmpty()) fail("$whose has no tokens; give some text")
    val wrong = ids.firstOrNull { it !in 0 until vocab } ?: return
    fail("$whose has the token $wrong, the model has $vocab; is the tokenizer another model's?")
}

/** The inputs that change from call to call, in buffers that are made anew where their size changes. */
private class Feed(private val calls: Calls, private val graph: Graph, private val buffers: Buffers) : AutoCloseable {
    private var held = Held(buffers)
    private var size = 0
    private lateinit var ids: LongBuffer
    private var slots: LongBuffer? = null
    private val past = Tensor("int64", longArrayOf(1), buffers).also { calls.input("past_length", it) }

    fun put(tokens: IntArray, at: Int, slotOf: (Int) -> Int) {
        if (tokens.size != size) {
            held.close()
            held = Held(buffers)
            size = tokens.size
            ids = held.tensor("int64", 1, size.toLong()).also { calls.input("input_ids", it) }.buffer.asLongBuffer()
            if (graph.reads("slots")) {
                slots = held.tensor("int64", size.toLong()).also { calls.input("slots", it) }.buffer.asLongBuffer()
            }
        }
        tokens.forEachIndexed { i, token ->
            ids.put(i, token.toLong())
            slots?.put(i, slotOf(at + i).toLong())
        }
        past.buffer.asLongBuffer().put(0, at.toLong())
    }

    override fun close() {
        held.close()
        past.close()
    }
}

/** One answer under way, token by token: for loops of your own. Close it; until then its model is busy. */
class Stream internal constructor(private val model: Model, prompt: IntArray, newTokens: Int, memory: ContextMemory?) : AutoCloseable {
    private val app = model.app
    private val turn = model.takeTurn()
    private val held = Held(model.buffers)
    private val given = mutableMapOf<String, OnnxTensor>()
    private val how = held.keep(OrtSession.RunOptions())
    private var slots = IntArray(0)
    private val read = IntList()
    private lateinit var calls: Calls
    private lateinit var feed: Feed
    private lateinit var logits: FloatBuffer
    internal val pending: IntArray

    /** Positions read, and positions that there are. */
    var past = 0
        private set
    val capacity: Int

    init {
        try {
            requireTokens(prompt, app.vocab, "the prompt")
            if (newTokens < 1) fail("$newTokens new tokens were asked for; ask for 1 or more")
            if (memory != null && app.context == null) fail("this model keeps no memory of a context; give all of it as the prompt")
            if (app.task == "seq2seq") {
                encode(prompt)
                pending = intArrayOf(app.decoderStart ?: fail("app.json has no decoder_start; embed the bundle again")) + app.forced
                capacity = minOf(app.maxContext, newTokens + 1 + app.forced.size)
            } else {
                pending = app.context?.let { splice(it, prompt, memory) } ?: prompt
                if (pending.size >= app.maxContext) {
                    fail("the prompt has ${pending.size} tokens, the model's context is ${app.maxContext}; shorten it")
                }
                capacity = minOf(app.maxContext.toLong(), pending.size.toLong() + newTokens).toInt()
            }
            prepare()
        } catch (error: Throwable) {
            close()
            throw error
        }
    }

    /** All tokens that the decoder has read. */
    internal val seen: IntArray get() = read.toArray()

    private fun prepare() {
        val graph = model.graph("decoder")
        calls = Calls(graph, capacity, given, held)
        feed = held.keep(Feed(calls, graph, model.buffers))
        val out = held.tensor("float32", 1, 1, app.vocab.toLong())
        calls.output("logits", out)
        logits = out.buffer.asFloatBuffer()
        last = held.tensor("int64", 1).also { calls.input("logit_positions", it) }.buffer.asLongBuffer()
    }

    private lateinit var last: LongBuffer

    private fun encode(prompt: IntArray) {
        if (prompt.size > app.maxContext) {
            fail("the prompt has ${prompt.size} tokens, the model reads at most ${app.maxContext}; shorten it")
        }
        val size = prompt.size.toLong()
        val mask = held.tensor("bool", 1, size).also { it.fill(1) }
        given["encoder_mask"] = mask.value
        model.graph("encoder").runOnce(given + ("input_ids" to held.ints(prompt, 1, size).value), how).use { encoded ->
            val crossed = held.keep(model.graph("cross_kv").runOnce(encoded.tensors() + given, how))
            given += crossed.tensors()
        }
    }

    /** The prompt behind the rows of a memory: a token 0 stands for each of them. */
    private fun splice(context: ContextSpec, prompt: IntArray, memory: ContextMemory?): IntArray {
        val rows = memory?.rows ?: 0
        if (rows > context.rows) fail("the context gives $rows rows of memory, the model takes ${context.rows}; give a shorter one")
        if (memory != null && memory.fingerprint != app.fingerprint) {
            fail("the memory was made by another model, or by other weights of this one; read the context again")
        }
        val early = if (context.released && rows > 0) 1 else 0
        val lead = context.prefix.dropLast(early).toIntArray()
        slots = IntArray(lead.size) { -1 } + IntArray(rows) { it }
        val values = held.tensor("float32", 1, maxOf(1, rows).toLong(), context.hidden.toLong())
        memory?.let { values.putFloats(it.values) }
        given["memory"] = values.value
        return lead + IntArray(rows + early) + prompt
    }

    /** Reads the prompt; the logits [vocab] of what comes next. They are valid until the next call. */
    fun prefill(): FloatBuffer {
        if (past > 0) fail("the prompt has been read already; feed tokens")
        return append(pending)
    }

    /** Appends a token; the logits of what comes next. Throws EdgewrightException where the context is full. */
    fun feed(token: Int): FloatBuffer {
        if (past == 0) fail("the prompt has not been read yet; call prefill first")
        requireTokens(intArrayOf(token), app.vocab, "the stream")
        return append(intArrayOf(token))
    }

    private fun append(tokens: IntArray): FloatBuffer {
        if (past + tokens.size > capacity) {
            fail("${past + tokens.size} tokens do not fit the context of $capacity; ask for fewer new tokens, or shorten the prompt")
        }
        for (at in tokens.indices step app.chunk) {
            val part = tokens.copyOfRange(at, minOf(tokens.size, at + app.chunk))
            feed.put(part, past) { slots.getOrElse(it) { -1 } }
            last.put(0, part.size - 1L)
            calls.run(how)
            past += part.size
            read.add(part)
        }
        return logits
    }

    /** Ends the call that runs now, from any thread: it throws. */
    internal fun stop() = how.setTerminate(true)

    override fun close() {
        held.close()
        turn.close()
    }
}

internal fun OrtSession.Result.tensors(): Map<String, OnnxTensor> = associate { (name, value) -> name to value as OnnxTensor }

/** Appends the memory of one part of a context to `rows`. */
internal fun readPart(model: Model, context: ContextSpec, part: IntArray, values: MutableList<FloatArray>, how: OrtSession.RunOptions) {
    val graph = model.graph("context")
    Held(model.buffers).use { held ->
        if (context.tokens.isEmpty()) {
            val given = mapOf("input_ids" to held.ints(part, 1, part.size.toLong()).value)
            graph.runOnce(given, how).use {
                values +=
                    it.tensors().getValue("memory").floatBuffer.let { all -> FloatArray(all.remaining()).also(all::get) }
            }
            return
        }
        val ids = part + context.tokens
        val calls = Calls(graph, ids.size, emptyMap(), held)
        val feed = held.keep(Feed(calls, graph, model.buffers))
        for (at in ids.indices step model.app.chunk) {
            val tokens = ids.copyOfRange(at, minOf(ids.size, at + model.app.chunk))
            feed.put(tokens, at) { -1 }
            val wanted = tokens.indices.filter { at + it >= part.size }
            val asked = wanted.ifEmpty { listOf(tokens.size - 1) }.toIntArray()
            Held(model.buffers).use { step ->
                calls.input("logit_positions", step.ints(asked, asked.size.toLong()))
                val out = step.tensor("float32", 1, asked.size.toLong(), context.hidden.toLong())
                calls.output("memory", out)
                calls.run(how)
                if (wanted.isNotEmpty()) values += FloatArray(asked.size * context.hidden).also { out.buffer.asFloatBuffer().get(it) }
            }
        }
    }
}

/** Ints that grow. */
internal class IntList(private var values: IntArray = IntArray(64)) {
    var size = 0
        private set

    fun add(value: Int) {
        if (size == values.size) values = values.copyOf(2 * size)
        values[size++] = value
    }

    fun add(all: IntArray) = all.forEach(::add)

    fun toArray(from: Int = 0): IntArray = values.copyOfRange(from, size)
}
