package edgewright

import ai.onnxruntime.OrtSession
import kotlinx.coroutines.CancellationException
import kotlinx.coroutines.CoroutineStart
import kotlinx.coroutines.Dispatchers
import kotlinx.coroutines.NonCancellable
import kotlinx.coroutines.awaitCancellation
import kotlinx.coroutines.cancelAndJoin
import kotlinx.coroutines.channels.Channel
import kotlinx.coroutines.currentCoroutineContext
import kotlinx.coroutines.ensureActive
import kotlinx.coroutines.flow.Flow
import kotlinx.coroutines.flow.buffer
import kotlinx.coroutines.flow.channelFlow
import kotlinx.coroutines.flow.flowOn
import kotlinx.coroutines.launch
import kotlinx.coroutines.withContext
import java.io.File
import java.util.concurrent.atomic.AtomicBoolean

/**
 * threads: 0 for as many as there are cores. checkHashes: damaged weights load without an error, so every file is hashed first.
 * availableMemory: bytes that are free, null for not asked. buffers: where states live.
 */
class LoadOptions(
    val threads: Int = 0,
    val checkHashes: Boolean = true,
    val availableMemory: Long? = null,
    val buffers: Buffers = Buffers.Direct,
)

/**
 * maxNewTokens, sampling: null for the model's own. stops: strings that end the answer and are no part of it. chat: through the chat
 * template, where the model has one. memory: of a decoder-decoder.
 */
class GenerateOptions(
    val maxNewTokens: Int? = null,
    val sampling: Sampling? = null,
    val stops: List<String> = emptyList(),
    val chat: Boolean = true,
    val memory: ContextMemory? = null,
)

/** Why an answer ended: an end token, as many tokens as were asked for, no room left, a stop string. */
enum class Ending { END, LIMIT, CONTEXT, STOP }

class Answer(
    val text: String,
    val tokens: IntArray,
    val ending: Ending,
    val promptTokens: Int,
    val firstSeconds: Double,
    val seconds: Double,
)

/** What a flow gives: pieces of text, each of whole characters, then the answer. */
sealed interface Event {
    class Piece(val text: String) : Event

    class Done(val answer: Answer) : Event
}

/** A model opened. It answers one prompt at a time: a second call meanwhile throws EdgewrightException. */
class Model private constructor(val app: App, private val folder: File, options: LoadOptions) : AutoCloseable {
    internal val buffers = options.buffers
    private val busy = AtomicBoolean()
    private val graphs = mutableMapOf<String, Graph>()
    private val tokenizer = app.tokenizer?.let { Tokenizer.read(File(folder, it.file)) }

    init {
        try {
            app.graphs.forEach { graphs[it.name] = Graph(it, folder, options.threads) }
        } catch (error: Throwable) {
            close()
            throw error
        }
    }

    companion object {
        /** Opens the folder that app.json lies in. Throws EdgewrightException. */
        fun open(folder: File, options: LoadOptions = LoadOptions()): Model {
            val app = App.read(folder)
            if (options.availableMemory != null && options.availableMemory < app.memoryBytes) {
                fail(
                    "${app.name} takes ${app.memoryBytes / MEGABYTE} MB of memory, ${options.availableMemory / MEGABYTE} MB are free; " +
                        "close other apps, or export with fewer --bits or a shorter --max-context",
                )
            }
            checkFiles(folder, app.files, options.checkHashes)
            return Model(app, folder, options)
        }

        private const val MEGABYTE = 1_000_000L
    }

    internal fun graph(name: String) = graphs[name] ?: fail("app.json has no graph $name; embed the bundle again")

    internal fun takeTurn(): AutoCloseable {
        if (busy.getAndSet(true)) fail("the model is answering already; wait for that answer, cancel it, or open a second model")
        return AutoCloseable { busy.set(false) }
    }

    private fun reader() = tokenizer ?: fail("${app.name} has no tokenizer: give it token ids")

    /** The tokens of a text, without what stands around a prompt; and the text of tokens. */
    fun tokens(text: String): IntArray = reader().encode(text)

    fun text(ids: IntArray): String = reader().decode(ids)

    /** The tokens of a prompt, with what stands around it. */
    fun readPrompt(prompt: String, chat: Boolean = true): IntArray {
        val around = app.tokenizer ?: fail("${app.name} has no tokenizer: give it token ids")
        if (prompt.all(::isSpace)) fail("the prompt is empty; give some text")
        val template = app.chat.takeIf { chat }
        val ids =
            if (template != null) {
                val before =
                    template.before
                        ?: fail("the chat template takes no lone question; render app.json's chat.template, or pass chat = false")
                tokens(before + (if (template.trims) prompt.trim(::isSpace) else prompt) + template.after)
            } else {
                around.before + tokens(prompt) + around.after
            }
        return if (around.bos != null && ids.size > 1 && ids[0] == around.bos && ids[1] == around.bos) ids.drop(1).toIntArray() else ids
    }

    /** An answer under way; it must not outlive the model. */
    fun start(prompt: IntArray, newTokens: Int, memory: ContextMemory? = null) = Stream(this, prompt, newTokens, memory)

    /** The memory of a context, for a decoder-decoder. */
    fun readContext(context: String): ContextMemory = readContext(tokens(context))

    fun readContext(ids: IntArray): ContextMemory {
        val context = app.context ?: fail("this model reads no context; give all of it as the prompt")
        requireTokens(ids, context.vocab, "the context")
        return takeTurn().use {
            val parts = mutableListOf<FloatArray>()
            OrtSession.RunOptions().use { how ->
                for (at in ids.indices step context.window) {
                    readPart(this, context, ids.copyOfRange(at, minOf(ids.size, at + context.window)), parts, how)
                }
            }
            val values = FloatArray(parts.sumOf { it.size })
            parts.fold(0) { at, part -> at + part.size.also { part.copyInto(values, at) } }
            ContextMemory(values.size / context.hidden, values, app.fingerprint)
        }
    }

    /** The answer to a prompt, on this thread. onText gets each piece when it is whole characters. */
    fun answer(prompt: String, options: GenerateOptions = GenerateOptions(), onText: (String) -> Unit = {}): Answer =
        answer(readPrompt(prompt, options.chat), options, onText)

    fun answer(prompt: IntArray, options: GenerateOptions = GenerateOptions(), onText: (String) -> Unit = {}): Answer =
        start(prompt, mostTokens(options), options.memory).use { answerLoop(this, it, prompt.size, options, onText) }

    /** The same as a flow, computed on another thread. Cancelling its collector ends the call that runs. */
    fun stream(prompt: String, options: GenerateOptions = GenerateOptions()): Flow<Event> =
        flowOf(options) { readPrompt(prompt, options.chat) }

    fun stream(prompt: IntArray, options: GenerateOptions = GenerateOptions()): Flow<Event> = flowOf(options) { prompt }

    private fun flowOf(options: GenerateOptions, read: () -> IntArray): Flow<Event> = channelFlow {
        val prompt = read()
        start(prompt, mostTokens(options), options.memory).use { stream ->
            val watcher = launch(start = CoroutineStart.UNDISPATCHED) { stopWhenCancelled(stream) }
            try {
                send(
                    Event.Done(
                        answerLoop(this@Model, stream, prompt.size, options) { piece ->
                            currentCoroutineContext().ensureActive()
                            send(Event.Piece(piece))
                        },
                    ),
                )
            } catch (error: EdgewrightException) {
                currentCoroutineContext().ensureActive() // a call that was ended throws, too
                throw error
            } finally {
                withContext(NonCancellable) { watcher.cancelAndJoin() } // before the stream that it would end is closed
            }
        }
    }.buffer(Channel.RENDEZVOUS).flowOn(Dispatchers.Default)

    private suspend fun stopWhenCancelled(stream: Stream) {
        try {
            awaitCancellation()
        } catch (error: CancellationException) {
            stream.stop()
            throw error
        }
    }

    internal fun mostTokens(options: GenerateOptions) = minOf(options.maxNewTokens ?: app.maxNewTokens, app.maxContext - 1)

    internal fun writer(options: GenerateOptions): Writer {
        val stops = app.stopStrings + options.stops
        if ("" in stops) fail("an empty stop string would stop before the first letter; give some text")
        return Writer(tokenizer, stops)
    }

    /** Throws EdgewrightException while an answer is under way. */
    override fun close() {
        if (busy.get()) fail("an answer is under way; cancel it before the model is closed")
        graphs.values.forEach { it.close() }
        graphs.clear()
    }
}

/** The loop. Inline, so that `onText` may suspend where the caller may. */
internal inline fun answerLoop(
    model: Model,
    stream: Stream,
    promptTokens: Int,
    options: GenerateOptions,
    onText: (String) -> Unit,
): Answer {
    var began = System.nanoTime()
    val most = model.mostTokens(options)
    val sampler = Sampler(options.sampling ?: model.app.sampling)
    val writer = model.writer(options)
    val tokens = IntList()
    val text = StringBuilder()
    var ending = Ending.CONTEXT
    var first = 0.0
    var logits = stream.prefill()
    while (true) {
        val token = sampler.pick(logits) { stream.seen }
        if (tokens.size == 0) {
            first = (System.nanoTime() - began) / 1e9
            began = System.nanoTime()
        }
        if (token in model.app.stopTokens) {
            ending = Ending.END
            break
        }
        tokens.add(token)
        val piece = writer.put(token)
        text.append(piece)
        if (piece.isNotEmpty()) onText(piece)
        if (writer.stopped) {
            ending = Ending.STOP
        } else if (tokens.size == most) {
            ending = Ending.LIMIT
        } else if (stream.past < stream.capacity) {
            logits = stream.feed(token)
            continue
        }
        break
    }
    val rest = writer.end()
    text.append(rest)
    if (rest.isNotEmpty()) onText(rest)
    if (writer.stopped) ending = Ending.STOP
    return Answer(text.toString(), tokens.toArray(), ending, promptTokens, first, (System.nanoTime() - began) / 1e9)
}
